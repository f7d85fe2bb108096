"""The config page of ``onecycle ui``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.ui.analysis import analyze, compute_for_text
from engine.ui.assistance import complete, describe
from engine.ui.config_file import ConfigFile, FileChangedError
from engine.ui.export import export
from engine.ui.form import change_type, list_gallery, remove_param, set_param
from engine.ui.replies import Download, Numbers
from engine.ui.server import Action
from engine.ui.settings import RunSettings

__all__ = ["TEMPLATE", "ConfigPage"]

TEMPLATE = """\
{
  "train_batch_size": 32,
  "optimizer": {
    "type": "AdamW",
    "params": { "lr": 0.001 }
  },
  "scheduler": {
    "type": "OneCycle",
    "params": {
      "cycle_min_lr": 0.0001,
      "cycle_max_lr": 0.001,
      "cycle_first_step_size": 1000
    }
  }
}
"""
"""Initial text of a config file that does not exist yet."""


class ConfigPage:
    """The web page for editing one config file.

    Args:
        file: file to edit.
    """

    html = "config.html"

    def __init__(self, file: ConfigFile) -> None:
        self._file = file

    @property
    def actions(self) -> Mapping[str, Action]:
        """Dict that maps the name of each action to the function that runs it."""
        return {
            "open": self._open,
            "version": lambda _: {"version": self._file.find_version()},
            "save": self._save,
            "analyze": self._analyze,
            "complete": lambda body: complete(_read_text(body), _read_offset(body)),
            "describe": lambda body: describe(_read_text(body), _read_offset(body)),
            "edit": _edit,
            "gallery": lambda _: {"types": list_gallery()},
            "export": self._export,
        }

    def _open(self, body: Mapping[str, Any]) -> dict[str, Any]:
        del body  # The page edits only one file.
        snapshot = self._file.read()
        path = self._file.path
        return {**snapshot._asdict(), "name": path.name, "path": str(path.absolute())}

    def _save(self, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            version = self._file.save(_read_text(body), str(body.get("version", "")))
        except FileChangedError:
            return {"version": None, "found": self._file.find_version()}
        return {"version": version}

    def _analyze(self, body: Mapping[str, Any]) -> Numbers:
        settings = RunSettings.from_json(body.get("settings"))
        return analyze(
            _read_text(body),
            self._file.path.name,
            settings,
            self._read_compared(body),
            _read_window(body.get("window")),
        )

    def _export(self, body: Mapping[str, Any]) -> Download:
        settings = RunSettings.from_json(body.get("settings"))
        name = self._file.path.name
        curves = compute_for_text(_read_text(body), name, settings, self._read_compared(body))
        return export(curves, name, str(body.get("format")), log=body.get("log") is True)

    def _read_compared(self, body: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return the other configs and schedules to draw for comparison; see `compute_curves`."""
        given = body.get("compared")
        compared = [each for each in given if isinstance(each, dict)] if given else []
        return [
            {**each, "text": self._file.read().text} if each.get("saved") is True else each
            for each in compared
        ]


def _edit(body: Mapping[str, Any]) -> dict[str, Any]:
    """Edit the scheduler block in the text of a config, and return a dict with the new text."""
    text = _read_text(body)
    if isinstance(body.get("type"), str):
        steps = RunSettings.from_json({"steps": body.get("steps")}).steps
        return {"text": change_type(text, body["type"], *([steps] if steps else []))}
    name = body.get("param")
    if not isinstance(name, str):
        raise ValueError("`param` must be the name of a schedule parameter.")
    if "value" not in body:
        return {"text": remove_param(text, name)}
    return {"text": set_param(text, name, body["value"])}


def _read_text(body: Mapping[str, Any]) -> str:
    text = body.get("text")
    if not isinstance(text, str):
        raise ValueError("`text` must be a string.")
    return text


def _read_offset(body: Mapping[str, Any]) -> int:
    offset = body.get("offset")
    if type(offset) is not int or offset < 0:
        raise ValueError("`offset` must be a whole number >= 0.")
    return offset


def _read_window(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    match value:
        case [int(first), int(last)]:
            return first, last
    raise ValueError("`window` must be a list with the first and last step to draw.")

"""Command-line arguments of training scripts that win over the config file.

SambaFlow's (``--learning_rate``, ``--max_steps``, …) and DeepSpeed's (``--deepspeed_config``, and
the parameters of its schedules), with the meanings that they have there.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.config.parser import Document
from engine.config.pointers import pointer_to, split_pointer
from schedules import Schedule, find
from schedules.core.descriptions import descriptions_of
from schedules.core.fields import fields_of, wanted
from schedules.core.registry import of_family

__all__ = ["Override", "add_config_arguments", "override"]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


_OF_RUN: Mapping[str, tuple[str, Callable[[str], Any], str]] = {
    "learning_rate": ("LR", float, "learning rate of the optimizer: `optimizer.params.lr`"),
    "lr_schedule": ("TYPE", str, "schedule: `scheduler.type`; see `onecycle schedules`"),
    "warmup_steps": ("N", _json, "length of the warmup: `scheduler.params.warmup_steps`"),
    "max_steps": (
        "N",
        int,
        "length that shapes the schedule: `engine.max_duration` and `scheduler.params.max_steps`",
    ),
    "steps_this_run": (
        "N",
        int,
        "updates after which this run ends, wherever the schedule is: `engine.steps_this_run`",
    ),
    "end_lr_ratio": (
        "R",
        float,
        "share of the learning rate at the end: `scheduler.params.end_lr_ratio`",
    ),
}


@functools.cache
def _of_schedules() -> dict[str, type[Schedule[Any]]]:
    """Return each parameter of DeepSpeed's schedules, and the last schedule that has it."""
    return {
        name: cls
        for cls in of_family("families.deepspeed").values()
        for name in fields_of(cls)
        if name != "last_batch_iteration"
    }


# A script may have arguments of the same names for purposes of its own: only those of a parser that
# `add_config_arguments` has seen are taken for ours.
_MARK = "config_arguments"


@dataclass(frozen=True)
class Override:
    """A value that an argument put into a config, and what the file had there, if it had any."""

    argument: str
    pointer: str
    value: Any
    in_file: str

    def __str__(self) -> str:
        instead = f", not {self.in_file}" if self.in_file else ""
        return f"`{self.pointer}` is {json.dumps(self.value)} by {self.argument}{instead}"


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the arguments that name a config and that win over it; return the parser.

    Give the parsed namespace to ``initialize(args=…)``. An argument that is not given changes
    nothing.

    >>> parser = add_config_arguments(argparse.ArgumentParser())
    >>> args = parser.parse_args(["--deepspeed_config", "ds_config.json", "--max_steps", "100"])
    >>> args.deepspeed_config, args.max_steps, args.learning_rate
    ('ds_config.json', 100, None)
    """
    config = parser.add_argument_group("config", "what runs; as in DeepSpeed")
    config.add_argument("--deepspeed", action="store_true", help="accepted, and of no effect here")
    config.add_argument("--deepspeed_config", metavar="FILE", help="the ds_config.json")
    run = parser.add_argument_group("run", "each wins over the config file; as in SambaFlow")
    for name, (metavar, kind, text) in _OF_RUN.items():
        run.add_argument(f"--{name}", metavar=metavar, type=kind, help=text)
    tuning = parser.add_argument_group(
        "schedule", "parameters of DeepSpeed's schedules; each wins over `scheduler.params`"
    )
    for name, cls in _of_schedules().items():
        field = fields_of(cls)[name]
        default = "" if field.required else f" (default: {json.dumps(field.default)})"
        text = (
            f"{cls.type_name}: {descriptions_of(cls)[name]} Takes {wanted(field.schema)}{default}."
        )
        # A flag alone is true, as DeepSpeed's --cycle_momentum.
        flag: dict[str, Any] = (
            {"nargs": "?", "const": True} if field.default in (True, False) else {}
        )
        tuning.add_argument(
            f"--{name}", metavar="VALUE", type=_json, help=text.replace("%", "%%"), **flag
        )
    parser.set_defaults(**{_MARK: True})
    return parser


def override(document: Document, args: argparse.Namespace) -> tuple[Document, list[Override]]:
    """Return the document with the values of a namespace's arguments, and what they changed.

    The namespace is one of a parser that `add_config_arguments` has seen; any other changes
    nothing.
    """
    if not getattr(args, _MARK, False) or not isinstance(document.value, dict):
        return document, []
    value = json.loads(json.dumps(document.value))
    changes: list[Override] = []
    given = {name: each for name, each in vars(args).items() if each is not None}
    schedule = value.get("scheduler")
    another = "lr_schedule" in given and isinstance(schedule, dict)
    if another and schedule.get("type") != given["lr_schedule"]:
        schedule.pop("params", None)  # they are the other schedule's
    for argument, pointer, new in _targets(given, value):
        *sections, key = split_pointer(pointer)
        around = value
        for section in sections:
            around = around.setdefault(section, {})
            if not isinstance(around, dict):
                break  # what is wrong with it is said when the document is checked
        else:
            place = document.places.get(pointer)
            in_file = ""
            if place is not None and around.get(key) != new:
                had = json.dumps(document.at(pointer))
                in_file = f"{had} as at {document.name}:{place.value[0]}:{place.value[1]}"
            around[key] = new
            changes.append(Override(f"--{argument}", pointer, new, in_file))
    origins = {change.pointer: change.argument for change in changes}
    return replace(document, value=value, arguments=origins), changes


def _targets(given: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield argument, pointer and value, the schedule's type first."""
    if "lr_schedule" in given:
        yield "lr_schedule", "/scheduler/type", given["lr_schedule"]
    schedule = config.get("scheduler")
    schedule = schedule if isinstance(schedule, dict) else {}
    params = schedule.get("params") or {}
    fields = _fields_of_type(given.get("lr_schedule") or schedule.get("type"))
    if "learning_rate" in given:
        if "optimizer" in config:
            yield "learning_rate", "/optimizer/params/lr", given["learning_rate"]
        if "optimizer" not in config or "learning_rate" in params:
            yield "learning_rate", "/scheduler/params/learning_rate", given["learning_rate"]
    if "max_steps" in given:
        yield "max_steps", "/engine/max_duration", given["max_steps"]
        if "max_steps" in fields:
            yield "max_steps", "/scheduler/params/max_steps", given["max_steps"]
    if "steps_this_run" in given:
        yield "steps_this_run", "/engine/steps_this_run", given["steps_this_run"]
    for name in ("warmup_steps", "end_lr_ratio", *_of_schedules()):
        if name in given:
            yield name, pointer_to("/scheduler/params", name), given[name]


def _fields_of_type(name: object) -> Mapping[str, Any]:
    try:
        return fields_of(find(name)) if isinstance(name, str) else {}
    except ValueError:
        return {}  # an unknown type is a problem of the document's

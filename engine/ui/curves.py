"""Compute the hyperparameter curves that the config page draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.config.parser import Document, parse
from engine.config.rules import RuleContext
from engine.display.auto_values import AutoValues
from engine.display.catalog import fit_example
from engine.display.preview import Preview, preview_document
from engine.errors import Problem
from engine.ui.settings import RunSettings
from schedules import SCHEDULES
from schedules.core.controller import Curves
from schedules.core.curves import Curve
from schedules.plots import LABELS, find_phases

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CurveSet", "compute_curves"]

MAX_EXACT = 200_000
"""Maximum number of steps that the config page draws without sampling."""
_SAMPLES = 20_000
"""Number of steps that the config page samples from a range of more than `MAX_EXACT` steps."""
_MAX_STEPS = 10**9
_MAX_CURVES = 200
_MAX_COMPARED = 8


class Column(NamedTuple):
    """A curve of one hyperparameter, and the names from which the legend label is built."""

    hyperparameter: str
    group: str
    """Name of the param group; empty if all groups share the curve."""
    source: str
    """Name of the compared config or schedule; empty for curves of the config in the editor."""
    curve: Curve

    @property
    def label(self) -> str:
        """The label of the curve in a legend."""
        return " · ".join(filter(None, (self.source or "this config", self.group)))


@dataclass(frozen=True)
class CurveSet:
    """The hyperparameter curves of a config, and of the configs and schedules compared with it."""

    preview: Preview
    columns: Sequence[Column]
    steps: int

    def select_steps(self, window: tuple[int, int] | None) -> NDArray[np.float64]:
        """Return the steps to draw: all steps in a range, or evenly spaced steps if it is long.

        Args:
            window: first and last step of the range; None for all steps of the run.
        """
        import numpy as np

        first, last = (0, self.steps - 1) if window is None else window
        first = max(0, min(first, self.steps - 1))
        last = max(first, min(last, self.steps - 1))
        count = last - first + 1
        if count <= MAX_EXACT:
            return np.arange(first, last + 1, dtype=float)
        return np.unique(np.linspace(first, last, _SAMPLES).round())

    def evaluate(self, steps: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
        """Yield the values of each curve at the given steps.

        Args:
            steps: steps in ascending order.
        """
        import numpy as np

        is_contiguous = _is_contiguous(steps)
        known: dict[Curve, NDArray[np.float64]] = {}
        for column in self.columns:
            if column.curve not in known:
                values = np.empty(len(steps))
                if is_contiguous:
                    column.curve.fill(values, int(steps[0]))
                else:
                    values[:] = column.curve(steps.astype(np.int64))
                known[column.curve] = values
            yield known[column.curve]

    def to_json(self, steps: NDArray[np.float64]) -> dict[str, Any]:
        """Return the data of the plots, except the curves' values, as a JSON-compatible dict.

        Args:
            steps: steps to draw, in ascending order.
        """
        panels: dict[str, dict[str, Any]] = {}
        for column in self.columns:
            name = column.hyperparameter
            panel = panels.setdefault(name, {"name": name, "label": LABELS[name], "columns": []})
            panel["columns"].append({"label": column.label, "isCompared": bool(column.source)})
        return {
            "steps": self.steps,
            "first": int(steps[0]),
            "count": len(steps),
            "isSampled": not _is_contiguous(steps),
            "panels": list(panels.values()),
            "phases": self._find_phases(),
            "constants": self._list_constants(),
        }

    def _find_phases(self) -> list[dict[str, Any]]:
        first = self.columns[0] if self.columns else None
        if first is None:
            return []
        phases = find_phases({first.label: first.curve}, [first.label], self.steps)
        return [{"step": step, "name": name} for step, name in phases.items()]

    def _list_constants(self) -> list[dict[str, Any]]:
        """Return the hyperparameters that the schedule does not change, with their values."""
        return [
            {"label": LABELS[name], "values": sorted(set(values))}
            for name, values in self.preview.base.items()
            if name not in self.preview.curves and any(values)
        ]


def _is_contiguous(steps: NDArray[np.float64]) -> bool:
    return bool(len(steps) == steps[-1] - steps[0] + 1)


Examined = tuple[Sequence[Problem], RuleContext | None]
"""Return value of `examine`: a config's problems, and its `RuleContext` if it has one."""


def compute_curves(
    document: Document,
    settings: RunSettings,
    *,
    examined: Examined,
    steps_per_epoch: int | None,
    compared: Sequence[Mapping[str, Any]] = (),
) -> CurveSet:
    """Compute the curves of a config, and of the configs and schedules in ``compared``.

    Args:
        document: parsed config.
        settings: run settings that the user entered on the config page.
        examined: return value of `examine` for the config.
        steps_per_epoch: number of optimizer steps per epoch; None if unknown.
        compared: other configs and schedules to draw for comparison. Each has a ``label``, and
            either the ``text`` of a config or the ``type`` of a schedule.

    Raises:
        ConfigError: the schedule of the config, or of a config in ``compared``, is invalid.
        ValueError: there are too many steps or curves.
    """

    def build(document: Document, examined: Examined | None = None) -> Preview:
        return preview_document(
            document,
            world_size=settings.world_size,
            steps_per_epoch=steps_per_epoch,
            auto=AutoValues(total_steps=settings.steps),
            examined=examined,
            epochs_hint="Enter the steps per epoch or the dataset size.",
        )

    # "auto" is replaced for the curves, so the config must be validated again.
    own = build(document, None if '"auto"' in document.text else examined)
    others: list[tuple[str, Preview | str]] = []
    for each in compared[:_MAX_COMPARED]:
        label = str(each.get("label", ""))
        if each.get("type") in SCHEDULES:
            others.append((label, str(each["type"])))
        elif isinstance(each.get("text"), str):
            others.append((label, build(parse(each["text"], label))))
    previews = [own, *(other for _, other in others if isinstance(other, Preview))]
    steps = settings.steps or max(each.span for each in previews)
    if steps > _MAX_STEPS:
        raise ValueError(
            f"The config page can plot at most {_MAX_STEPS:,} steps, got {steps:,}. Enter a "
            "smaller number of steps."
        )
    for each_preview in previews:
        each_preview.check_length(steps)
    columns = [*_list_columns(own.curves, own.groups, "")]
    for label, other in others:
        if isinstance(other, Preview):
            columns += _list_columns(other.curves, other.groups, label)
        else:
            columns += _list_columns(fit_example(other, own, steps), (), label)
    if len(columns) > _MAX_CURVES:
        raise ValueError(
            f"The config page can plot at most {_MAX_CURVES} curves, got {len(columns)}. Select "
            "fewer configs and schedules to compare."
        )
    order = list(LABELS)
    columns.sort(key=lambda column: order.index(column.hyperparameter))
    return CurveSet(own, columns, steps)


def _list_columns(curves: Curves, groups: Sequence[str], source: str) -> Iterator[Column]:
    for name, of_groups in curves.items():
        if len(set(of_groups)) == 1:
            yield Column(name, "", source, of_groups[0])
            continue
        for index, curve in enumerate(of_groups):
            group = groups[index] if index < len(groups) else f"group {index}"
            yield Column(name, group, source, curve)

"""Generate the output of `onecycle schedules`: a list of all schedules, or one schedule's page."""

from __future__ import annotations

import inspect
import json
import operator
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from schedules import SCHEDULES, Horizon, Schedule
from schedules.core.combinators import dilate, pointwise
from schedules.core.controller import Curves
from schedules.core.curves import Curve, constant
from schedules.core.descriptions import read_descriptions
from schedules.core.fields import describe_schema, read_fields
from schedules.core.trace import DEFAULT_BASE

if TYPE_CHECKING:
    from engine.display.preview import Preview

__all__ = [
    "EXAMPLE_RUN",
    "EXAMPLE_STEPS",
    "example_curves",
    "fit_example",
    "format_page",
    "get_summary",
    "list_schedules",
]

EXAMPLE_RUN = Horizon(total_steps=100, steps_per_epoch=10, samples_per_step=32)
"""Length of the run for which all example parameters were chosen."""

EXAMPLE_STEPS = 120
"""Number of steps to plot: more than the length of the run, to show the values after its end."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_EXACT = 100_000
_BASE = {**DEFAULT_BASE, "weight_decay": (0.01,)}


def get_summary(cls: type[Schedule[Any]]) -> str:
    """Return the first line of a schedule's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def example_curves(cls: type[Schedule[Any]]) -> dict[str, Curve]:
    """Return the curve of each hyperparameter that a schedule sets with its example parameters."""
    curves = cls(**cls.example).build_curves(_BASE, EXAMPLE_RUN)
    return {name: groups[0] for name, groups in curves.items()}


def fit_example(name: str, other: Preview, steps: int) -> Curves:
    """Return the curves of a schedule's example, fitted to those of a config, to compare them.

    Args:
        name: type of the schedule.
        other: preview of the config. The learning rate of the example is multiplied by a factor, so
            that both have the same peak.
        steps: length of the plot, to which the example's run of 100 steps is stretched.
    """
    curves = example_curves(SCHEDULES[name])
    length = int(EXAMPLE_RUN.total_steps or 1)
    if "lr" in curves:
        own = max(curves["lr"].values(length))
        peak = max(max(_sample(curve, steps)) for curve in other.curves.get("lr", (constant(own),)))
        if own > 0:
            curves["lr"] = pointwise(operator.mul, curves["lr"], constant(peak / own))
    return {key: (dilate(curve, steps / length),) for key, curve in curves.items()}


def _sample(curve: Curve, steps: int) -> Iterable[float]:
    if steps <= _MAX_EXACT:
        return curve.values(steps)
    return (curve(index * (steps - 1) // _MAX_EXACT) for index in range(_MAX_EXACT + 1))


def list_schedules() -> Iterator[str]:
    """Yield one line per schedule: the name, a small plot of the learning rate, and the summary."""
    width = max(map(len, SCHEDULES))
    for name, cls in SCHEDULES.items():
        yield f"{name:{width}}  {_draw_sparkline(example_curves(cls)['lr'])}  {get_summary(cls)}"


def format_page(cls: type[Schedule[Any]]) -> Iterator[str]:
    """Yield the lines of a schedule's page: description, parameters, example and small plots."""
    yield cls.type_name
    yield ""
    yield (inspect.getdoc(cls) or "").partition("\n\n>>>")[0]
    yield ""
    descriptions = read_descriptions(cls)
    for name, field in read_fields(cls).items():
        default = "required" if field.required else f"default {json.dumps(field.default)}"
        yield f"  {name}  ({describe_schema(field.schema)}; {default})"
        yield f"      {field.complete(descriptions[name])}"
    yield ""
    block = {"scheduler": {"type": cls.type_name, "params": dict(cls.example)}}
    yield json.dumps(block, indent=2)
    yield ""
    for name, curve in example_curves(cls).items():
        yield f"{name:12}  {_draw_sparkline(curve, width=60)}"


def _draw_sparkline(curve: Curve, width: int = 24) -> str:
    values = [curve(step * EXAMPLE_STEPS // width) for step in range(width)]
    low, high = min(0.0, *values), max(values)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in values)

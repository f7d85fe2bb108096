"""Generate the output of `onecycle schedules`: a list of all schedules, or the details of one."""

from __future__ import annotations

import inspect
import json
import operator
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from engine.display.terminal import format_rows, wrap
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
    "group_by_source",
    "list_schedules",
]

EXAMPLE_RUN = Horizon(total_steps=100, steps_per_epoch=10, samples_per_step=32)
"""Length of the run for which all example parameters were chosen."""

EXAMPLE_STEPS = 120
"""Number of steps to plot, including 20 steps after the end of `EXAMPLE_RUN`."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_EXACT = 100_000
_SOURCES = {
    "families.deepspeed": "DeepSpeed",
    "families.composer": "Composer (MosaicML)",
    "families.pytorch": "PyTorch",
    "families.d2l": "Dive into Deep Learning",
    "families.sambaflow": "SambaFlow (SambaNova)",
    "families.megatron": "Megatron-LM",
    "families.general": "General",
    "families.composites": "Built from other schedules",
    "feedback.autowu": "Driven by the loss or a metric",
    "feedback.plateau": "Driven by the loss or a metric",
}
"""Maps each module to the heading under which its schedules are listed."""
_BASE = {**DEFAULT_BASE, "weight_decay": (0.01,)}


def get_summary(cls: type[Schedule[Any]]) -> str:
    """Return the first line of a schedule's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def example_curves(cls: type[Schedule[Any]]) -> dict[str, Curve]:
    """Return the hyperparameter curves of a schedule that is built with its example parameters."""
    curves = cls(**cls.example).build_curves(_BASE, EXAMPLE_RUN)
    return {name: groups[0] for name, groups in curves.items()}


def fit_example(name: str, other: Preview, steps: int) -> Curves:
    """Return a schedule's example curves, scaled for comparison with a config's schedule.

    Args:
        name: type of the example schedule.
        other: preview of the config's schedule. The example is scaled to the same peak
            learning rate.
        steps: number of steps to plot. The 100 steps of the example are stretched to this length.
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


def list_schedules(width: int | None = None) -> Iterator[str]:
    """Yield the lines of a table of all schedules, with learning-rate sparklines and summaries.

    Args:
        width: number of columns of the terminal; None to print each schedule on one line.
    """
    for title, schedules in group_by_source().items():
        yield f"{title}:"
        rows = [
            (name, _draw_sparkline(example_curves(cls)["lr"]), get_summary(cls).replace("``", ""))
            for name, cls in schedules.items()
        ]
        yield from format_rows(rows, width, indent=2)
        yield ""
    yield "`onecycle schedules TYPE` prints the formula, the parameters and an example."


def group_by_source() -> dict[str, dict[str, type[Schedule[Any]]]]:
    """Return the schedules grouped by origin, in the order of `_SOURCES`."""
    modules = {f"schedules.{module}": title for module, title in _SOURCES.items()}
    groups: dict[str, dict[str, type[Schedule[Any]]]] = {title: {} for title in modules.values()}
    for name, cls in SCHEDULES.items():
        groups.setdefault(modules.get(cls.__module__, "Your own"), {})[name] = cls
    return groups


def format_page(cls: type[Schedule[Any]], width: int | None = None) -> Iterator[str]:
    """Yield the lines of a schedule's page: docstring, parameters, example config and sparklines.

    Args:
        cls: class of the schedule.
        width: maximum number of columns per line; None to leave the lines unwrapped.
    """
    yield cls.type_name
    yield ""
    for paragraph in (inspect.getdoc(cls) or "").partition("\n\n>>>")[0].split("\n\n"):
        yield from _fit_paragraph(paragraph, width)
        yield ""
    descriptions = read_descriptions(cls)
    for name, field in read_fields(cls).items():
        default = "required" if field.required else f"default {json.dumps(field.default)}"
        yield from wrap(f"  {name}  ({describe_schema(field.schema)}; {default})", width, indent=6)
        yield from wrap(f"      {field.complete(descriptions[name])}", width, indent=6)
    yield ""
    block = {"scheduler": {"type": cls.type_name, "params": dict(cls.example)}}
    yield json.dumps(block, indent=2)
    yield ""
    for name, curve in example_curves(cls).items():
        yield f"{name:12}  {_draw_sparkline(curve, width=60)}"


def _fit_paragraph(paragraph: str, width: int | None) -> Iterator[str]:
    """Yield the lines of a docstring paragraph. Wrap them unless they are an indented formula."""
    lines = paragraph.splitlines()
    is_formula = any(line.startswith(" ") for line in lines)
    if width is None or is_formula or all(len(line) <= width for line in lines):
        yield from lines
    else:
        yield from wrap(" ".join(lines), width, indent=0)


def _draw_sparkline(curve: Curve, width: int = 24) -> str:
    values = [curve(step * EXAMPLE_STEPS // width) for step in range(width)]
    low, high = min(0.0, *values), max(values)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in values)

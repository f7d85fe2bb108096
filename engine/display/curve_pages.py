"""Build a page of schedule charts, and a chart that shows why AutoWU ended its warmup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.display.html_charts import Decision, Line, Mark, Page, Panel
from schedules.core.controller import Evidence
from schedules.core.curves import Curve
from schedules.plots import (
    LABELS,
    choose_styles,
    find_phases,
    group_by_panel,
    is_log_panel,
    is_sweep,
)

__all__ = ["build_curve_page", "build_decision"]

_LOSS = "loss"
_MAX_LOSSES = 5000
"""Maximum number of warmup losses to draw. If there are more, only evenly spaced ones are drawn."""


def build_curve_page(
    columns: Mapping[str, Sequence[float]],
    title: str,
    *,
    steps: Sequence[int],
    curves: Mapping[str, Curve] | None = None,
    sources: Mapping[str, str] | None = None,
    log: bool | None = None,
    evidence: Evidence | None = None,
) -> Page:
    """Return a page with one chart per hyperparameter.

    For the arguments, see `engine.display.plots.draw`.
    """
    styles = choose_styles(columns, sources)
    panels = []
    marks: dict[int, str] = {}
    is_exponential = False
    for name, members in group_by_panel(columns).items():
        shown = [columns[each] for each in members]
        count = min(len(steps), max(map(len, shown)))
        end = steps[-1] + 1 if steps else 0
        marks = marks or find_phases(curves or {}, members, end)
        lines = [
            Line(
                each.partition(".")[2] or LABELS.get(name, name),
                _fill_up(columns[each], count),
                color=styles[each][0],
                is_compared=styles[each][1] > 0,
            )
            for each in members
        ]
        has_lr = is_log_panel(name, shown)
        is_exponential |= has_lr and all(map(is_sweep, shown))
        is_log = name == _LOSS or has_lr
        panels.append(Panel(name, LABELS.get(name, name), steps[:count], lines, is_log=is_log))
    return Page(
        title,
        panels,
        marks=[Mark(step, name) for step, name in marks.items()],
        decision=None if evidence is None else build_decision(evidence),
        is_log=is_exponential if log is None else log,
    )


def build_decision(evidence: Evidence) -> Decision:
    """Return a `Decision` whose text and chart show why a loss-driven warmup ended."""
    step, lr, reason, probability = evidence.decision
    sure = "" if probability is None else f" (probability {probability:.3f})"
    text = f"The warmup ended after step {step}, at a learning rate of {lr:.4g}: {reason}{sure}."
    count, band = len(evidence.losses), evidence.band
    every = -(-count // _MAX_LOSSES) or 1
    columns = {"loss": {float(k): evidence.losses[k] for k in range(0, count, every)}}
    if band is not None:
        steps = [float(position) * count for position in band.positions]
        for name, values in (("mean", band.mean), ("low", band.low), ("high", band.high)):
            columns[name] = dict(zip(steps, map(float, values), strict=True))
    positions = sorted(set().union(*columns.values()))
    lines = [
        Line(
            name,
            [values.get(position) for position in positions],
            color=0 if name == "loss" else 1,
            is_compared=name in {"low", "high"},
            has_gaps=True,
        )
        for name, values in columns.items()
    ]
    panel = Panel("losses", "warmup loss", positions, lines)
    return Decision(text, [panel], [Mark(step, "")])


def _fill_up(values: Sequence[float], count: int) -> list[float | None]:
    return [*values, *[None] * (count - len(values))]

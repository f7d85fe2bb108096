"""Plot hyperparameters against the step number in the terminal, with plotext."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.display.terminal import wrap
from schedules.core.curves import Curve
from schedules.core.extras import require_package
from schedules.plots import (
    LABELS,
    choose_styles,
    find_phases,
    group_by_panel,
    is_log_panel,
    keep_positive,
)

__all__ = ["choose_ticks", "draw_on_terminal"]

_MAX_PLOTTED = 1e300
"""Largest absolute value that is passed to plotext, which overflows near the largest float."""
_LARGE_UNIT = 1e8
"""Unit of a panel that contains values larger than `_MAX_PLOTTED`."""
_COLORS = ("blue+", "green+", "red+", "cyan+", "magenta+", "yellow", "white", "gray")
"""Names of plotext colors, in the order in which a plot uses them."""
_LEAST_ROWS = 3
_FRAME = 2  # the lines above and below the curve
_COLUMNS_PER_TICK = 12
_MAX_DIGITS = 17  # enough to tell any two floats apart


@dataclass(frozen=True)
class _Panel:
    """One panel of a terminal plot: its values and the scale of its vertical axis."""

    title: str
    columns: Mapping[str, Sequence[float]]
    """The values to draw, in multiples of ``unit``; NaN for values that cannot be drawn."""
    phases: Mapping[int, str]
    is_log: bool
    unit: float

    @property
    def values(self) -> list[float]:
        """All values that the panel shows, in multiples of ``unit``."""
        return [
            value for column in self.columns.values() for value in column if not math.isnan(value)
        ]


def draw_on_terminal(
    columns: Mapping[str, Sequence[float]],
    title: str,
    *,
    steps: Sequence[int] | None = None,
    curves: Mapping[str, Curve] | None = None,
    sources: Mapping[str, str] | None = None,
    log: bool = False,
    size: tuple[int, int] = (80, 24),
    color: bool = False,
) -> str:
    """Return a text plot with one panel per hyperparameter.

    The plot leaves one line of the terminal free for the shell prompt, unless it has too many
    panels to fit.

    Args:
        columns: values at each step, by column name.
        title: title of the plot, printed above the panels.
        steps: step number of each value in a column, in ascending order (default: 0, 1, 2, …).
        curves: curve of each column; its phases are listed in the plot.
        sources: name of each column's schedule, if several schedules are compared.
        log: whether the axis of the learning rate is logarithmic.
        size: width and height of the terminal in characters.
        color: whether to color the plot with ANSI escape codes.

    Raises:
        MissingExtraError: plotext is not installed.
    """
    require_package("plotext", "A plot in the terminal")
    width, height = size
    positions = range(max(map(len, columns.values()))) if steps is None else steps
    panels = list(_build_panels(columns, positions, curves or {}, log=log))
    head = wrap(title, width)
    phases = [panel.phases for panel in panels if panel.phases]
    is_shared = all(each == phases[0] for each in phases)
    notes = [_describe_phases(panel.phases, width) for panel in panels]
    footer = notes[0] if is_shared and phases else []
    if is_shared:
        notes = [[] for _ in panels]
    # One line per panel is its title, one below the last panel has the steps, one is the prompt.
    taken = len(head) + len(panels) + sum(map(len, notes)) + len(footer) + 2
    rows = max(_LEAST_ROWS, (height - taken) // len(panels) - _FRAME)
    labels = [
        choose_ticks(panel.values, rows, is_log=panel.is_log, unit=panel.unit) for panel in panels
    ]
    margin = max((len(label) for ticks in labels for label in ticks.values()), default=0)
    styles = choose_styles(columns, sources)
    text = head
    for panel, ticks, own in zip(panels, labels, notes, strict=True):
        is_last = panel is panels[-1]
        text.append(" " * (margin + 1) + panel.title)
        drawn = _draw_panel(
            panel,
            positions,
            {column: _COLORS[styles[column][0] % len(_COLORS)] for column in panel.columns},
            {value: label.rjust(margin) for value, label in ticks.items()},
            choose_ticks(positions, width // _COLUMNS_PER_TICK) if is_last else {},
            (width, rows + _FRAME + is_last),
            color=color,
        )
        text += [*drawn, *own]
    return "\n".join([*text, *footer])


def _build_panels(
    columns: Mapping[str, Sequence[float]],
    steps: Sequence[int],
    curves: Mapping[str, Curve],
    *,
    log: bool,
) -> Iterator[_Panel]:
    for name, names in group_by_panel(columns).items():
        is_log = log and is_log_panel(name, (columns[each] for each in names))
        # plotext fails on infinite values.
        shown = {
            each: [value if math.isfinite(value) else math.nan for value in columns[each]]
            for each in names
        }
        is_large = any(abs(value) > _MAX_PLOTTED for each in shown.values() for value in each)
        unit = _LARGE_UNIT if is_large else 1.0
        if is_large:
            shown = {each: [value / unit for value in values] for each, values in shown.items()}
        if is_log:
            shown = {each: keep_positive(values) for each, values in shown.items()}
        phases = find_phases(curves, names, steps[-1] + 1)
        yield _Panel(LABELS.get(name, name), shown, phases, is_log, unit)


def _describe_phases(phases: Mapping[int, str], width: int) -> list[str]:
    text = ", ".join(f"{phase} from step {start:,}" for start, phase in phases.items())
    return wrap(text, width, indent=0) if text else []


def _draw_panel(
    panel: _Panel,
    steps: Sequence[int],
    shades: Mapping[str, str],
    values: Mapping[float, str],
    positions: Mapping[float, str],
    size: tuple[int, int],
    *,
    color: bool,
) -> list[str]:
    """Render a panel as text, and return the lines.

    Args:
        panel: panel to draw.
        steps: step number of each plotted point, in ascending order.
        shades: color of each curve, by column name.
        values: labels of the vertical axis, by value.
        positions: labels of the horizontal axis, by step; empty to draw no labels.
        size: width and height in characters.
        color: whether to use colors.
    """
    plot = _import_plotext()
    plot.clear_figure()
    plot.theme("pro" if color else "clear")
    plot.plotsize(*size)
    if panel.is_log:
        plot.yscale("log")
    for column, drawn in panel.columns.items():
        label = column.partition(".")[2] or None
        plot.plot(
            list(steps[: len(drawn)]), drawn, marker="braille", label=label, color=shades[column]
        )
    for start in panel.phases:
        plot.vline(start)
    plot.xticks(list(positions), list(positions.values()))
    plot.yticks(list(values), list(values.values()))
    text = plot.build()
    return str(text if color else plot.uncolorize(text)).rstrip("\n").split("\n")


def _import_plotext() -> Any:
    import plotext

    return plotext


def choose_ticks(
    values: Sequence[float], most: int, *, is_log: bool = False, unit: float = 1.0
) -> dict[float, str]:
    """Choose values to label on an axis: the smallest, the largest, and round values in between.

    Args:
        values: values on the axis.
        most: maximum number of labels, at least 2.
        is_log: whether the axis is logarithmic.
        unit: factor by which the labels are larger than ``values``.

    Returns:
        The label of each chosen value, in ascending order. The labels of different values differ.

    >>> list(choose_ticks(range(4050), 6).values())
    ['0', '1,000', '2,000', '3,000', '4,049']
    >>> list(choose_ticks([0.004, 0.0], 4).values())
    ['0', '0.002', '0.004']
    """
    if not values:
        return {}
    low, high = min(values), max(values)
    scale = math.log10 if is_log else float
    # Round values that are close to one of the ends are left out, so that labels do not overlap.
    margin = (scale(high) - scale(low)) / max(1, most) * 0.75
    between = _list_powers(low, high) if is_log else _list_round_values(low, high, most)
    inner = [
        value
        for value in between
        if margin <= scale(value) - scale(low) and margin <= scale(high) - scale(value)
    ]
    chosen = sorted({low, high, *inner[: max(0, most - 2)]})
    largest = sys.float_info.max  # rounding can make the product infinite
    labels = _format_ticks([max(-largest, min(largest, value * unit)) for value in chosen])
    return dict(zip(chosen, labels, strict=True))


def _list_round_values(low: float, high: float, most: int) -> list[float]:
    """Return up to ``most`` evenly spaced round numbers between ``low`` and ``high``."""
    span = (high - low) / max(1, most - 1)
    if span <= 0:
        return []
    unit = 10.0 ** math.floor(math.log10(span))
    size = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= span)
    first, last = math.ceil(low / size), math.floor(high / size)
    return [index * size for index in range(first, last + 1)]


def _list_powers(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    return [10.0**exponent for exponent in range(first, last + 1)]


def _format_ticks(values: Sequence[float]) -> list[str]:
    """Format values with at least 3 digits, and with as many as make different values differ."""
    labels: list[str] = []
    for digits in range(3, _MAX_DIGITS + 1):
        labels = [_format_tick(value, digits) for value in values]
        if len({float(label.replace(",", "")) for label in labels}) == len(set(values)):
            break
    return labels


def _format_tick(value: float, digits: int) -> str:
    if value == int(value) and abs(value) < 10**9:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"

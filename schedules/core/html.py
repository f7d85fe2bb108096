"""Draw curves as HTML with inline SVG, for the ``_repr_html_`` methods that notebooks call."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from schedules.core.controller import Curves
from schedules.core.curves import Curve

__all__ = ["draw_html"]

_WIDTH, _HEIGHT = 360, 64  # pixels of one panel
_TOP, _LEFT = 16, 4  # pixels above and beside the curve
_POINTS = 180
_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd")


def draw_html(text: str, curves: Curves, steps: int, current: int | None = None) -> str:
    """Return HTML with the given text and a small plot of each hyperparameter.

    Args:
        text: text to show above the plots, such as the repr of a schedule.
        curves: curve of each hyperparameter in each param group. If empty, only the text is
            returned.
        steps: number of steps to plot.
        current: step to mark with a vertical line; None for no line.

    >>> from schedules.core.curves import linear
    >>> print(draw_html("warmup", {"lr": (linear(0.0, 0.1, 2),)}, steps=3))
    ... # doctest: +ELLIPSIS
    <pre>warmup</pre><svg ...<text x="4" y="11">lr: 0 to 0.1 over 3 steps</text>...</svg>
    """
    steps = max(2, steps)
    panels = [
        _draw_panel(name, list(dict.fromkeys(groups)), steps, current)
        for name, groups in curves.items()
    ]
    return f"<pre>{html.escape(text)}</pre>" + "<br>".join(panels)


def _draw_panel(name: str, curves: Sequence[Curve], steps: int, current: int | None) -> str:
    last = steps - 1
    count = min(steps, _POINTS)
    positions = [index * last // (count - 1) for index in range(count)]
    columns = [[curve(step) for step in positions] for curve in curves]
    finite = [value for values in columns for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    label = f"{name}: {low:.4g} to {high:.4g} over {steps:,} steps"
    parts = [f'<text x="{_LEFT}" y="11">{html.escape(label)}</text>']
    for index, values in enumerate(columns):
        points = " ".join(_place(positions, values, last, low, high))
        color = _COLORS[index % len(_COLORS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
    if current is not None and 0 <= current <= last:
        x = _LEFT + current / last * _WIDTH
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _HEIGHT}" '
            'stroke="currentColor" stroke-dasharray="2"/>'
        )
    size = f'width="{_WIDTH + 2 * _LEFT}" height="{_TOP + _HEIGHT + _LEFT}"'
    style = 'style="font: 11px sans-serif; fill: currentColor"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(parts)}</svg>'


def _place(
    positions: Sequence[int], values: Sequence[float], last: int, low: float, high: float
) -> Iterator[str]:
    """Yield the coordinates of each finite value, as "x,y" in pixels."""
    for step, value in zip(positions, values, strict=True):
        if math.isfinite(value):
            x = _LEFT + step / last * _WIDTH
            # With a constant curve, the line is in the middle.
            y = _TOP + _HEIGHT * ((high - value) / (high - low) if high > low else 0.5)
            yield f"{x:.1f},{y:.1f}"

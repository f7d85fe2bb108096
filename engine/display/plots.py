"""Plot hyperparameters against the step, as an image file or in the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from schedules.core.controller import Evidence
from schedules.core.curves import Curve
from schedules.plots import (
    LABELS,
    STYLE,
    build_figure,
    choose_styles,
    find_phases,
    group_by_panel,
    is_log_panel,
    keep_positive,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_decision", "draw_on_terminal"]

_LOSS = "loss"
_MAX_PLOTTED = 1e200
_COLORS = ("blue+", "green+", "red+", "cyan+", "magenta+", "yellow", "white", "gray")
"""Colors of plotext, in the order in which a terminal plot uses them."""


def draw(
    columns: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
    *,
    steps: Sequence[int] | None = None,
    curves: Mapping[str, Curve] | None = None,
    sources: Mapping[str, str] | None = None,
    log: bool | None = None,
    evidence: Evidence | None = None,
    dpi: int = 150,
) -> Figure:
    """Plot columns against the step, with one panel per hyperparameter, and save the figure.

    Args:
        columns: values at each step, by column name; see `schedules.plots.name_columns`.
        path: output file. Its suffix, such as ``.png`` or ``.pdf``, selects the format.
        title: title of the figure.
        steps: step of each value, in ascending order (default: 0, 1, 2, …).
        curves: curve of each column; its phases, such as the warmup, are labeled in the plot.
        sources: schedule that each column belongs to, if several schedules are compared.
        log: whether the axis of the learning rate is logarithmic (default: only for an exponential
            sweep).
        evidence: losses from which a loss-driven schedule determined the end of its warmup, and the
            Gaussian process that was fitted to these losses. Both are plotted in an additional
            panel. If ``columns`` contains ``loss``, the panel shows that column instead of these
            losses.
        dpi: resolution of the image in dots per inch.
    """
    import matplotlib as mpl

    shown = {name: columns[name] for name in columns if evidence is None or name != _LOSS}
    figure, axes = build_figure(
        shown,
        title,
        steps=steps,
        curves=curves,
        sources=sources,
        log=log,
        extra_panels=0 if evidence is None else 1,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        if evidence is not None:
            _draw_loss(axes[-1], columns.get(_LOSS, evidence.losses), evidence)
        figure.savefig(path, dpi=dpi)
    return figure


def _draw_loss(axis: Axes, losses: Sequence[float], evidence: Evidence) -> None:
    """Plot the losses of a run, and the Gaussian process fitted to the losses of its warmup."""
    axis.plot(range(len(losses)), losses, ".", markersize=2, color="tab:blue", alpha=0.4)
    axis.set_ylabel(_LOSS)
    if evidence.band is None:
        return
    band, count = evidence.band, len(evidence.losses)
    steps = [position * count for position in band.positions]
    axis.plot(steps, band.mean, color="black", linewidth=1.2, label="Gaussian process")
    axis.fill_between(steps, band.low, band.high, color="black", alpha=0.15, linewidth=0)
    lowest = min(range(len(steps)), key=lambda index: band.mean[index])
    axis.axvline(steps[lowest], color="tab:green", linewidth=1, label="minimum of the process")
    axis.axvline(evidence.decision.step, color="tab:red", linewidth=1, label="end of the warmup")
    finite = [loss for loss in losses if math.isfinite(loss)]
    start, below = statistics.median(finite[: len(finite) // 20 + 1]), min(finite)
    if start > below:  # limit the axis, so that a diverging loss does not flatten the rest
        axis.set_ylim(below - 0.1 * (start - below), start + 0.5 * (start - below))
    axis.legend()


def draw_decision(evidence: Evidence, path: Path, title: str) -> None:
    """Plot the learning rate and losses of a loss-driven warmup, and state why the warmup ended."""
    step, lr, reason, probability = evidence.decision
    confidence = "" if probability is None else f" (probability {probability:.3f})"
    draw(
        {"lr": evidence.lrs},
        path,
        f"{title}, step {step}: lr {lr:.4g}\n{reason}{confidence}",
        evidence=evidence,
    )


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
    """Return a text plot of columns against the step, with one panel per hyperparameter.

    Args:
        columns: values at each step, by column name.
        title: first line of the text.
        steps: step of each value, in ascending order (default: 0, 1, 2, …).
        curves: curve of each column; its phases are listed below the panel.
        sources: schedule that each column belongs to, if several schedules are compared.
        log: whether the axis of the learning rate is logarithmic.
        size: width and height of the terminal in characters.
        color: whether to color the plot with ANSI escape codes.
    """
    import plotext

    panels, styles = group_by_panel(columns), choose_styles(columns, sources)
    width, height = size[0], max(9, (size[1] - 2) // len(panels))
    text = [title]
    for name, panel_columns in panels.items():
        plotext.clear_figure()
        plotext.theme("pro" if color else "clear")
        plotext.plotsize(width, height)
        is_log = log and is_log_panel(name, (columns[each] for each in panel_columns))
        if is_log:
            plotext.yscale("log")
        for column in panel_columns:
            label = column.partition(".")[2] or None
            # plotext fails on infinite values and overflows on values near the largest float.
            drawn = [value if abs(value) < _MAX_PLOTTED else math.nan for value in columns[column]]
            drawn = keep_positive(drawn) if is_log else drawn
            positions = list(range(len(drawn)) if steps is None else steps[: len(drawn)])
            shade = _COLORS[styles[column][0] % len(_COLORS)]
            plotext.plot(positions, drawn, marker="braille", label=label, color=shade)
        end = len(columns[panel_columns[0]]) if steps is None else steps[-1] + 1
        phases = find_phases(curves or {}, panel_columns, end)
        for start in phases:
            plotext.vline(start)
        plotext.title(LABELS.get(name, name))
        panel = plotext.build()
        text.append(panel if color else plotext.uncolorize(panel))
        if phases:
            text.append("  ".join(f"{start}: {phase}" for start, phase in phases.items()))
    return "\n".join(text)

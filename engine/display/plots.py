"""Plot hyperparameters against the step, as an image file or in the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from schedules.core.controller import Evidence
from schedules.core.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "draw_decision", "draw_on_terminal"]

LABELS = {"lr": "learning rate", "momentum": "momentum", "weight_decay": "weight decay"}
_LOSS = "loss"
_MAX_PLOTTED = 1e200


def group_by_panel(columns: Iterable[str]) -> dict[str, list[str]]:
    """Group column names by plot panel. The panel ``lr``, for example, shows ``lr.0`` and ``lr.1``.

    >>> group_by_panel(["lr.0", "lr.1", "momentum"])
    {'lr': ['lr.0', 'lr.1'], 'momentum': ['momentum']}
    """
    panels: dict[str, list[str]] = {}
    for column in columns:
        panels.setdefault(column.partition(".")[0], []).append(column)
    return panels


def _find_phases(curves: Mapping[str, Curve], panel: Sequence[str], steps: int) -> dict[int, str]:
    """Return the phases of a panel's curve, as a dict from first step to phase name.

    Return an empty dict if the panel shows several curves, or if ``curves`` does not contain the
    curve.
    """
    if len(panel) > 1 or panel[0] not in curves:
        return {}
    named = curves[panel[0]].phases()
    return {int(phase.start): phase.name for phase in named if 0 <= phase.start < steps}


def _find_end(values: Sequence[float], steps: Sequence[int] | None) -> int:
    """Return the number of steps on the horizontal axis of a plot."""
    return len(values) if steps is None else steps[-1] + 1


def draw(
    columns: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
    *,
    steps: Sequence[int] | None = None,
    curves: Mapping[str, Curve] | None = None,
    evidence: Evidence | None = None,
    dpi: int = 150,
) -> None:
    """Plot columns against the step, with one panel per hyperparameter, and save the figure.

    Args:
        columns: values at each step, by column name; see `Preview.columns` for the names.
        path: output file. Its suffix, such as ``.png`` or ``.pdf``, selects the format.
        title: title of the figure.
        steps: step of each value, in ascending order (default: 0, 1, 2, …).
        curves: curve of each column; its phases, such as the warmup, are labeled in the plot.
        evidence: losses from which a loss-driven schedule determined the end of its warmup, and the
            Gaussian process that was fitted to these losses. Both are plotted in an additional
            panel. If ``columns`` contains ``loss``, the panel shows that column instead of these
            losses.
        dpi: resolution of the image in dots per inch.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = group_by_panel(name for name in columns if evidence is None or name != _LOSS)
    count = len(panels) + (evidence is not None)
    figure = Figure(figsize=(8, 1.2 + 2.0 * count), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    if evidence is not None:
        _draw_loss(axes[-1], columns.get(_LOSS, evidence.losses), evidence)
    for axis, (name, panel_columns) in zip(axes, panels.items(), strict=False):
        for column in panel_columns:
            values = columns[column]
            # Values are constant during a step, so the plot is a staircase.
            axis.plot(
                range(len(values)) if steps is None else steps[: len(values)],
                values,
                drawstyle="steps-post",
                linewidth=1.2,
                label=column.partition(".")[2],
            )
        end = _find_end(columns[panel_columns[0]], steps)
        for start, phase in _find_phases(curves or {}, panel_columns, end).items():
            axis.axvline(start, color="gray", linestyle=":", linewidth=0.8)
            position = ((start, 1.0), axis.get_xaxis_transform())
            axis.annotate(
                phase, position[0], (3, 2), position[1], "offset points", fontsize=7, color="gray"
            )
        axis.set_ylabel(LABELS.get(name, name))
        axis.grid(alpha=0.3)
        if len(panel_columns) > 1:
            axis.legend(fontsize="small")
    axes[-1].set_xlabel("step (k)")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, parse_math=False)  # file names can contain $
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def _draw_loss(axis: Axes, losses: Sequence[float], evidence: Evidence) -> None:
    """Plot the losses of a run, and the Gaussian process fitted to the losses of its warmup."""
    axis.plot(range(len(losses)), losses, ".", markersize=2, color="tab:blue", alpha=0.4)
    axis.set_ylabel(_LOSS)
    axis.grid(alpha=0.3)
    if evidence.band is None:
        return
    band, count = evidence.band, len(evidence.losses)
    steps = [position * count for position in band.positions]
    axis.plot(steps, band.mean, color="black", linewidth=1.2, label="Gaussian process")
    axis.fill_between(steps, band.low, band.high, color="black", alpha=0.15, linewidth=0)
    lowest = min(range(len(steps)), key=lambda index: band.mean[index])
    axis.axvline(steps[lowest], color="tab:green", linewidth=1, label="its minimum")
    axis.axvline(evidence.decision.step, color="tab:red", linewidth=1, label="switch")
    finite = [loss for loss in losses if math.isfinite(loss)]
    start, below = statistics.median(finite[: len(finite) // 20 + 1]), min(finite)
    if start > below:  # limit the axis, so that a diverging loss does not flatten the rest
        axis.set_ylim(below - 0.1 * (start - below), start + 0.5 * (start - below))
    axis.legend(fontsize="small")


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
    size: tuple[int, int] = (80, 24),
    color: bool = False,
) -> str:
    """Return a text plot of columns against the step, with one panel per hyperparameter.

    Args:
        columns: values at each step, by column name.
        title: first line of the text.
        steps: step of each value, in ascending order (default: 0, 1, 2, …).
        curves: curve of each column; its phases are listed below the panel.
        size: width and height of the terminal in characters.
        color: whether to color the plot with ANSI escape codes.
    """
    import plotext

    panels = group_by_panel(columns)
    width, height = size[0], max(9, (size[1] - 2) // len(panels))
    text = [title]
    for name, panel_columns in panels.items():
        plotext.clear_figure()
        plotext.theme("pro" if color else "clear")
        plotext.plotsize(width, height)
        for column in panel_columns:
            label = column.partition(".")[2] or None
            # plotext fails on infinite values and overflows on values near the largest float.
            drawn = [value if abs(value) < _MAX_PLOTTED else math.nan for value in columns[column]]
            positions = list(range(len(drawn)) if steps is None else steps[: len(drawn)])
            plotext.plot(positions, drawn, marker="braille", label=label)
        end = _find_end(columns[panel_columns[0]], steps)
        phases = _find_phases(curves or {}, panel_columns, end)
        for start in phases:
            plotext.vline(start)
        plotext.title(LABELS.get(name, name))
        panel = plotext.build()
        text.append(panel if color else plotext.uncolorize(panel))
        if phases:
            text.append("  ".join(f"{start}: {phase}" for start, phase in phases.items()))
    return "\n".join(text)

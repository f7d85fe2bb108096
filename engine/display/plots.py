"""Curves as pictures: a panel for each hyperparameter, in a file or on the terminal."""

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

__all__ = ["LABELS", "draw", "draw_decision", "draw_on_terminal", "panels_of"]

LABELS = {"lr": "learning rate", "momentum": "momentum", "weight_decay": "weight decay"}
_LOSS = "loss"
_MOST = 1e200


def panels_of(columns: Iterable[str]) -> dict[str, list[str]]:
    """Return the columns of each panel: ``lr.0`` and ``lr.1`` share the panel ``lr``.

    >>> panels_of(["lr.0", "lr.1", "momentum"])
    {'lr': ['lr.0', 'lr.1'], 'momentum': ['momentum']}
    """
    panels: dict[str, list[str]] = {}
    for column in columns:
        panels.setdefault(column.partition(".")[0], []).append(column)
    return panels


def _phases(curves: Mapping[str, Curve], panel: Sequence[str], steps: int) -> dict[int, str]:
    """Return the named phases of a panel of one curve; over several curves they would be noise."""
    if len(panel) > 1 or panel[0] not in curves:
        return {}
    named = curves[panel[0]].phases()
    return {int(phase.begin): phase.name for phase in named if 0 <= phase.begin < steps}


def draw(
    columns: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
    *,
    curves: Mapping[str, Curve] | None = None,
    evidence: Evidence | None = None,
    dpi: int = 150,
) -> None:
    """Draw columns over the step into a PNG (or SVG, PDF), one panel for each hyperparameter.

    Args:
        columns: a column's name, as in `Preview.columns` or any other, to its values.
        path: where to write; its suffix chooses the format.
        title: what stands above the panels.
        curves: the curves of the columns, whose phases are named in the panels.
        evidence: why a schedule that listens has switched; drawn below, with the column ``loss`` if
            there is one.
        dpi: dots an inch.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = panels_of(name for name in columns if evidence is None or name != _LOSS)
    count = len(panels) + (evidence is not None)
    figure = Figure(figsize=(8, 1.2 + 2.0 * count), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    if evidence is not None:
        _draw_loss(axes[-1], columns.get(_LOSS, evidence.losses), evidence)
    for axis, (name, of_panel) in zip(axes, panels.items(), strict=False):
        for column in of_panel:
            values = columns[column]
            # A step's value holds for the whole update: stairs are to look like stairs.
            axis.plot(
                range(len(values)),
                values,
                drawstyle="steps-post",
                linewidth=1.2,
                label=column.partition(".")[2],
            )
        for begin, phase in _phases(curves or {}, of_panel, len(columns[of_panel[0]])).items():
            axis.axvline(begin, color="grey", linestyle=":", linewidth=0.8)
            place = ((begin, 1.0), axis.get_xaxis_transform())
            axis.annotate(
                phase, place[0], (3, 2), place[1], "offset points", fontsize=7, color="grey"
            )
        axis.set_ylabel(LABELS.get(name, name))
        axis.grid(alpha=0.3)
        if len(of_panel) > 1:
            axis.legend(fontsize="small")
    axes[-1].set_xlabel("optimizer updates applied (k)")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def _draw_loss(axis: Axes, losses: Sequence[float], evidence: Evidence) -> None:
    """Draw losses, and what the process behind a decision thinks of those of the warmup."""
    axis.plot(range(len(losses)), losses, ".", markersize=2, color="tab:blue", alpha=0.4)
    axis.set_ylabel(_LOSS)
    axis.grid(alpha=0.3)
    if evidence.band is None:
        return
    band, count = evidence.band, len(evidence.losses)
    steps = [place * count for place in band.places]
    axis.plot(steps, band.mean, color="black", linewidth=1.2, label="Gaussian process")
    axis.fill_between(steps, band.low, band.high, color="black", alpha=0.15, linewidth=0)
    lowest = min(range(len(steps)), key=lambda place: band.mean[place])
    axis.axvline(steps[lowest], color="tab:green", linewidth=1, label="its minimum")
    axis.axvline(evidence.decision.step, color="tab:red", linewidth=1, label="switch")
    finite = [loss for loss in losses if math.isfinite(loss)]
    start, below = statistics.median(finite[: len(finite) // 20 + 1]), min(finite)
    if start > below:  # what explodes is not to hide the rest
        axis.set_ylim(below - 0.1 * (start - below), start + 0.5 * (start - below))
    axis.legend(fontsize="small")


def draw_decision(evidence: Evidence, path: Path, title: str) -> None:
    """Draw the warmup that a decision ended: its learning rate, its losses, and why it did."""
    step, lr, why, probability = evidence.decision
    sure = "" if probability is None else f" (probability {probability:.3f})"
    draw(
        {"lr": evidence.lrs},
        path,
        f"{title}, update {step}: lr {lr:.4g}\n{why}{sure}",
        evidence=evidence,
    )


def draw_on_terminal(
    columns: Mapping[str, Sequence[float]],
    title: str,
    *,
    curves: Mapping[str, Curve] | None = None,
    size: tuple[int, int] = (80, 24),
    colour: bool = False,
) -> str:
    """Return columns over the step drawn in characters, one panel for each hyperparameter.

    Args:
        columns: as for `draw`.
        title: what stands above the panels.
        curves: the curves of the columns, whose phases are listed below each panel.
        size: width and height of the terminal in characters.
        colour: whether it understands colours.
    """
    import plotext

    panels = panels_of(columns)
    width, height = size[0], max(9, (size[1] - 2) // len(panels))
    text = [title]
    for name, of_panel in panels.items():
        plotext.clear_figure()
        plotext.theme("pro" if colour else "clear")
        plotext.plotsize(width, height)
        for column in of_panel:
            label = column.partition(".")[2] or None
            # plotext multiplies, and takes nothing infinite.
            drawn = [value if abs(value) < _MOST else math.nan for value in columns[column]]
            plotext.plot(drawn, marker="braille", label=label)
        phases = _phases(curves or {}, of_panel, len(columns[of_panel[0]]))
        for begin in phases:
            plotext.vline(begin)
        plotext.title(LABELS.get(name, name))
        picture = plotext.build()
        text.append(picture if colour else plotext.uncolorize(picture))
        if phases:
            text.append("  ".join(f"{begin}: {phase}" for begin, phase in phases.items()))
    return "\n".join(text)

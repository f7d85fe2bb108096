"""Plot hyperparameters against the training step, and save the plots as image files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from schedules.core.controller import Evidence
from schedules.core.curves import Curve
from schedules.plots import (
    STYLE,
    build_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_decision"]

_LOSS = "loss"


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
    """Plot columns against the step, one panel per hyperparameter; save and return the figure.

    Args:
        columns: values at each step, by column name; see `schedules.plots.name_columns`.
        path: output file. Its suffix, such as ``.png`` or ``.pdf``, selects the format.
        title: title of the figure.
        steps: training step of each row of values, in ascending order (default: 0, 1, 2, …).
        curves: curve of each column. Phases of a curve, such as the warmup, are labeled.
        sources: schedule that each column belongs to, if several schedules are compared.
        log: whether the axis of the learning rate is logarithmic (default: only for an exponential
            sweep).
        evidence: losses that led to the end of a loss-driven warmup, and the Gaussian process
            fitted to them, if any. Both are shown in an additional panel. If ``columns`` contains
            ``loss``, the panel shows that column instead of the losses in ``evidence``.
        dpi: resolution of the image in dots per inch.
    """
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
    import matplotlib as mpl  # `build_figure` reports a missing package

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        if evidence is not None:
            _draw_loss(axes[-1], columns.get(_LOSS, evidence.losses), evidence)
        figure.savefig(path, dpi=dpi)
    return figure


def _draw_loss(axis: Axes, losses: Sequence[float], evidence: Evidence) -> None:
    """Plot the losses of a run and the Gaussian process fitted to the warmup losses."""
    axis.plot(range(len(losses)), losses, ".", markersize=2, color="tab:blue", alpha=0.4)
    axis.set_ylabel(_LOSS)
    if evidence.band is None:
        return
    band, count = evidence.band, len(evidence.losses)
    steps = [position * count for position in band.positions]
    axis.plot(steps, band.mean, color="black", linewidth=1.2, label="Gaussian process")
    axis.fill_between(steps, band.low, band.high, color="black", alpha=0.15, linewidth=0)
    lowest = min(range(len(steps)), key=lambda index: band.mean[index])
    axis.axvline(
        steps[lowest], color="tab:green", linewidth=1, label="minimum of the Gaussian process"
    )
    axis.axvline(evidence.decision.step, color="tab:red", linewidth=1, label="end of the warmup")
    finite = [loss for loss in losses if math.isfinite(loss)]
    start, below = statistics.median(finite[: len(finite) // 20 + 1]), min(finite)
    if start > below:  # limit the axis, so that a diverging loss does not flatten the rest
        axis.set_ylim(below - 0.1 * (start - below), start + 0.5 * (start - below))
    axis.legend()


def draw_decision(evidence: Evidence, path: Path, title: str) -> None:
    """Plot the learning rate and losses of a warmup.

    The reason why the warmup ended is appended to ``title``.
    """
    step, lr, reason, probability = evidence.decision
    confidence = "" if probability is None else f" (probability {probability:.3f})"
    draw(
        {"lr": evidence.lrs},
        path,
        f"{title}, step {step}: lr {lr:.4g}\n{reason}{confidence}",
        evidence=evidence,
    )

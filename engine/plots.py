"""Curves as pictures: a panel for each hyperparameter, in a file or on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from schedules.curves import Curve

__all__ = ["LABELS", "draw", "draw_on_terminal", "panels_of"]

LABELS = {"lr": "learning rate", "momentum": "momentum", "weight_decay": "weight decay"}


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
    dpi: int = 150,
) -> None:
    """Draw columns over the step into a PNG (or SVG, PDF), one panel for each hyperparameter.

    Args:
        columns: a column's name, as in `Preview.columns` or any other, to its values.
        path: where to write; its suffix chooses the format.
        title: what stands above the panels.
        curves: the curves of the columns, whose phases are named in the panels.
        dpi: dots an inch.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = panels_of(columns)
    figure = Figure(figsize=(8, 1.2 + 2.0 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, of_panel) in zip(axes, panels.items(), strict=True):
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
            plotext.plot(list(columns[column]), marker="braille", label=label)
        phases = _phases(curves or {}, of_panel, len(columns[of_panel[0]]))
        for begin in phases:
            plotext.vline(begin)
        plotext.title(LABELS.get(name, name))
        drawn = plotext.build()
        text.append(drawn if colour else plotext.uncolorize(drawn))
        if phases:
            text.append("  ".join(f"{begin}: {phase}" for begin, phase in phases.items()))
    return "\n".join(text)

"""Plot the hyperparameters that schedules set at each step, using matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from schedules.core.curves import Curve
from schedules.core.durations import Horizon
from schedules.core.extras import require_package
from schedules.core.registry import from_config
from schedules.core.schedule import Schedule
from schedules.core.trace import complete_base

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "LABELS",
    "STYLE",
    "build_figure",
    "find_phases",
    "group_by_panel",
    "name_columns",
    "plot",
]

LABELS = {"lr": "learning rate", "momentum": "momentum", "weight_decay": "weight decay"}
LINE_STYLES = ("-", "--", "-.", ":")
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.xmargin": 0.01,
    "figure.titlesize": 12,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}
"""Matplotlib settings for all figures. The colors come from the user's own settings."""

_WIDTH = 7.2  # inches: a figure is readable at its natural size in a column of text
_LR_PANELS = ("lr",)
_SWEEP = 100.0  # ratio of the learning rates at the ends of a sweep, from which its axis is log
_CHARACTER = 0.013  # width of a character of a phase label, as a fraction of the panel's width
_MAX_EXACT = 100_000


def plot(
    *schedules: Schedule[Any] | Mapping[str, Any],
    steps: int | None = None,
    base: Mapping[str, float | Iterable[float]] | None = None,
    horizon: Horizon | None = None,
    log: bool | None = None,
) -> Figure:
    """Plot one schedule, or compare several, and return the matplotlib figure.

    The figure has one panel per hyperparameter. Notebooks display the figure. In a script, save it
    with ``figure.savefig("schedule.png")``.

    Args:
        *schedules: schedules, or ``{"type": …, "params": {…}}`` blocks.
        steps: number of steps to plot, up to 100,000. Defaults to the length of the run in
            ``horizon`` or, if it is unknown, to the length of the longest schedule.
        base: initial hyperparameters of the optimizer, each a number or a list with one number per
            param group. Defaults to a single group with learning rate 0.1, momentum 0.9 and weight
            decay 0.
        horizon: length of the run, used to convert time strings such as ``"10ep"`` to steps and
            to scale durations.
        log: whether the learning rate axis is logarithmic. A logarithmic axis does not show zeros.
            By default, the axis is logarithmic only for an exponential sweep.

    Raises:
        ValueError: no schedule is passed, a schedule is invalid, the length of the run is required
            but unknown, or ``steps`` is less than 1 or more than 100,000.

    >>> from schedules import LinearLR, OneCycleLR
    >>> figure = plot(OneCycleLR(max_lr=0.1, total_steps=100), LinearLR(total_iters=100))
    >>> [axis.get_ylabel() for axis in figure.axes]
    ['learning rate', 'momentum']
    """
    built = [each if isinstance(each, Schedule) else from_config(each) for each in schedules]
    if not built:
        raise ValueError("plot() requires at least one schedule. Pass a schedule or its config.")
    known = horizon.scaled_steps if horizon is not None else None
    count = steps
    if count is None:
        count = int(known or max(each.resolve(horizon).span for each in built))
    if not 1 <= count <= _MAX_EXACT:
        raise ValueError(
            f"The number of steps to plot must be between 1 and {_MAX_EXACT:,}, got {count:,}. Set "
            "`steps` to a number in this range."
        )
    initial = complete_base(base)
    curves: dict[str, Curve] = {}
    sources: dict[str, str] = {}
    for label, each in zip(_find_labels(built), built, strict=True):
        named = name_columns(each.build_curves(initial, horizon), label)
        curves |= named
        sources |= dict.fromkeys(named, label)
    values = {name: list(curve.values(count)) for name, curve in curves.items()}
    title = " and ".join(dict.fromkeys(each.type_name for each in built))
    return build_figure(values, title, curves=curves, sources=sources, log=log)[0]


def _find_labels(schedules: Sequence[Schedule[Any]]) -> list[str]:
    """Return the legend label of each schedule; "" if there is only one schedule.

    The label is the type of the schedule. If several schedules have the same type, the label of
    each is its index and repr.
    """
    names = [each.type_name for each in schedules]
    if len(names) == 1:
        return [""]
    return [
        name if names.count(name) == 1 else f"{index}: {schedule!r}"
        for index, (name, schedule) in enumerate(zip(names, schedules, strict=True))
    ]


def name_columns(curves: Mapping[str, tuple[Curve, ...]], label: str = "") -> dict[str, Curve]:
    """Return a dict that maps column names to the curves of a schedule.

    A column is named after its hyperparameter, such as ``lr``. If the param groups have different
    curves, there is one column per param group: ``lr.0``, ``lr.1``, …

    Args:
        curves: dict that maps each hyperparameter to its curve in each param group.
        label: label of the schedule, appended to each column name after a dot; may be empty.
    """
    columns = {}
    suffix = f".{label}" if label else ""
    for name, groups in curves.items():
        if len(set(groups)) == 1:
            columns[f"{name}{suffix}"] = groups[0]
        else:
            columns |= {f"{name}.{group}{suffix}": curve for group, curve in enumerate(groups)}
    return columns


def group_by_panel(columns: Iterable[str]) -> dict[str, list[str]]:
    """Group column names by plot panel. The panel ``lr``, for example, shows ``lr.0`` and ``lr.1``.

    >>> group_by_panel(["lr.0", "lr.1", "momentum"])
    {'lr': ['lr.0', 'lr.1'], 'momentum': ['momentum']}
    """
    panels: dict[str, list[str]] = {}
    for column in columns:
        panels.setdefault(column.partition(".")[0], []).append(column)
    return panels


def find_phases(curves: Mapping[str, Curve], panel: Sequence[str], steps: int) -> dict[int, str]:
    """Return the name of each phase of a panel's curve, keyed by the first step of the phase.

    A phase that starts at the last step is omitted. Return an empty dict if the panel shows several
    curves or its curve is not in ``curves``.
    """
    if len(panel) > 1 or panel[0] not in curves:
        return {}
    named = curves[panel[0]].phases()
    end = max(1, steps - 1)
    return {int(phase.start): phase.name for phase in named if 0 <= phase.start < end}


def choose_styles(
    columns: Iterable[str], sources: Mapping[str, str] | None = None
) -> dict[str, tuple[int, int]]:
    """Return a dict that maps each column to the indices of its color and its line style.

    ``sources`` maps each column to its schedule. The columns of a schedule have the same color in
    all panels, and its param groups have different line styles. Without ``sources``, each param
    group has a different color.

    >>> choose_styles(["lr.a", "momentum.a", "lr.b"], {"lr.a": "a", "momentum.a": "a", "lr.b": "b"})
    {'lr.a': (0, 0), 'momentum.a': (0, 0), 'lr.b': (1, 0)}
    """
    colors: dict[str, int] = {}
    drawn: dict[tuple[str, int], int] = {}
    styles = {}
    for column in columns:
        panel, _, label = column.partition(".")
        color = colors.setdefault((sources or {}).get(column) or label, len(colors))
        style = drawn[panel, color] = drawn.get((panel, color), -1) + 1
        styles[column] = (color, style)
    return styles


def keep_positive(values: Iterable[float]) -> list[float]:
    """Replace zero and negative values with NaN, because a logarithmic axis cannot show them."""
    return [value if value > 0 else math.nan for value in values]


def is_log_panel(panel: str, columns: Iterable[Sequence[float]]) -> bool:
    """Return whether a panel shows at least one positive learning rate.

    Only such a panel can have a logarithmic axis.
    """
    return panel in _LR_PANELS and any(value > 0 for values in columns for value in values)


def is_sweep(values: Sequence[float]) -> bool:
    """Return whether values increase exponentially, by a total factor of at least 100.

    >>> is_sweep([1e-5, 1e-4, 1e-3, 1e-2]), is_sweep([1e-4, 4e-3, 7e-3, 1e-2])
    (True, False)
    """
    first, middle, last = values[0], values[(len(values) - 1) // 2], values[-1]
    if not 0 < _SWEEP * first <= last < math.inf or list(values) != sorted(values):
        return False
    position = (len(values) - 1) // 2 / (len(values) - 1)
    return abs(math.log(middle / first) / math.log(last / first) - position) < 0.05


def trace_line(
    steps: Sequence[int], values: Sequence[float]
) -> tuple[Sequence[int], Sequence[float]]:
    """Return the x and y coordinates of a line that connects plateaus with vertical edges.

    A plateau is a value that is constant for several steps. Straight lines connect other values.

    >>> trace_line([0, 1, 2, 3], [0.1, 0.1, 0.2, 0.2])
    ([0, 1, 2, 2, 3], [0.1, 0.1, 0.1, 0.2, 0.2])
    >>> trace_line([0, 1, 2], [0.1, 0.2, 0.3])
    ([0, 1, 2], [0.1, 0.2, 0.3])
    """
    xs, ys = [], []
    for index, (step, value) in enumerate(zip(steps, values, strict=True)):
        is_edge = index > 1 and values[index - 2] == values[index - 1] != value
        if is_edge and values[min(index + 1, len(values) - 1)] == value:
            xs.append(step)
            ys.append(values[index - 1])
        xs.append(step)
        ys.append(value)
    return xs, ys


def build_figure(
    columns: Mapping[str, Sequence[float]],
    title: str,
    *,
    steps: Sequence[int] | None = None,
    curves: Mapping[str, Curve] | None = None,
    sources: Mapping[str, str] | None = None,
    log: bool | None = None,
    extra_panels: int = 0,
) -> tuple[Figure, list[Axes]]:
    """Plot columns against the step, with one panel per hyperparameter.

    Args:
        columns: dict that maps each column name (see `name_columns`) to the values of the column.
        title: title of the figure.
        steps: training step of each row of values, in ascending order (default: 0, 1, 2, …).
        curves: curve of each column; its phases, such as the warmup, are labeled in the plot.
        sources: dict that maps each column to the label of its schedule, if the figure compares
            schedules. All columns of a schedule have the same color.
        log: whether the learning rate axis is logarithmic (default: only for an exponential sweep).
        extra_panels: number of empty panels to add at the bottom.

    Returns:
        The figure and its panels, from top to bottom.
    """
    require_package("matplotlib", "A plot")
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = group_by_panel(columns)
    count = len(panels) + extra_panels
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 1.0 + 1.9 * count), layout="constrained")
        axes = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
        styles = choose_styles(columns, sources)
        labeled: dict[int, str] = {}
        for axis, (name, panel) in zip(axes, panels.items(), strict=False):
            _draw_panel(axis, name, {each: columns[each] for each in panel}, styles, steps, log=log)
            last = len(columns[panel[0]]) - 1 if steps is None else steps[-1]
            phases = find_phases(curves or {}, panel, last + 1)
            _mark_phases(axis, phases, last, is_labeled=phases != labeled)
            labeled = phases
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(title, parse_math=False)  # file names can contain $
    return figure, axes


def _draw_panel(
    axis: Axes,
    name: str,
    columns: Mapping[str, Sequence[float]],
    styles: Mapping[str, tuple[int, int]],
    steps: Sequence[int] | None,
    *,
    log: bool | None,
) -> None:
    if log is None:
        log = all(map(is_sweep, columns.values()))
    is_log = log and is_log_panel(name, columns.values())
    for column, values in columns.items():
        color, style = styles[column]
        drawn = keep_positive(values) if is_log else values
        axis.plot(
            *trace_line(range(len(values)) if steps is None else steps[: len(values)], drawn),
            color=f"C{color % 10}",
            linestyle=LINE_STYLES[style % len(LINE_STYLES)],
            label=column.partition(".")[2],
        )
    if is_log:
        axis.set_yscale("log")
    elif name in _LR_PANELS and (top := axis.get_ylim()[1]) > 0:
        axis.set_ylim(bottom=min(axis.get_ylim()[0], -0.03 * top))  # show the distance from 0
    axis.set_ylabel(LABELS.get(name, name))
    if len(columns) > 1:
        axis.legend()


def _mark_phases(axis: Axes, phases: Mapping[int, str], last: int, *, is_labeled: bool) -> None:
    """Mark the first step of each phase. If ``is_labeled``, write the phase names above the panel.

    Names that would overlap are written in separate rows. A name that would extend beyond the right
    edge of the panel is written to the left of the mark.
    """
    ends: list[float] = []  # where the last name of each row ends
    for start, name in phases.items():
        axis.axvline(start, color="gray", linestyle=":", linewidth=0.9)
        if not is_labeled:
            continue
        width = _CHARACTER * (len(name) + 2)
        left = start / max(1, last)
        is_beyond = left + width > 1 and left >= width  # the right edge of the panel
        left -= width if is_beyond else 0
        row = next((row for row, end in enumerate(ends) if end < left), len(ends))
        ends[row : row + 1] = [left + width]
        axis.annotate(
            name,
            (start, 1.0),
            (-2 if is_beyond else 2, 3 + 12 * row),
            axis.get_xaxis_transform(),
            "offset points",
            horizontalalignment="right" if is_beyond else "left",
            fontsize=9,
            color="dimgray",
        )

"""`schedules.plot`, the reprs of schedules, and their plots in notebooks."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import schedules
from schedules import (
    AutoWU,
    CosineAnnealingLR,
    Horizon,
    LinearLR,
    OneCycleLR,
    Phases,
    SequentialLR,
    StepLR,
    WarmupDecayLR,
    attach,
    plot,
)
from tests.schedules.test_torch_scheduler import weights

CYCLE = OneCycleLR(max_lr=0.1, total_steps=20)


def read_lines(figure):
    """Return the y values and the color of each line, by panel and label."""
    return {
        (axis.get_ylabel(), line.get_label()): (list(line.get_ydata()), to_hex(line.get_color()))
        for axis in figure.axes
        for line in axis.get_lines()
        if line.get_linestyle() != ":"
    }


def test_plot_returns_a_figure_with_the_values_of_each_step():
    figure = plot({"type": "LinearLR", "params": {"start_factor": 0.5, "total_iters": 2}}, steps=4)
    assert isinstance(figure, Figure)
    ((values, _),) = read_lines(figure).values()
    assert values == pytest.approx([0.05, 0.075, 0.1, 0.1])


def test_plot_compares_schedules_in_one_color_per_schedule():
    both = Phases(momentum=[{"to": 0.5, "duration": 9}], weight_decay=[{"to": 1, "duration": 9}])
    lines = read_lines(plot(CYCLE, LinearLR(), LinearLR(total_iters=9), both))
    colors = {}
    for (_, label), (_, color) in lines.items():
        colors.setdefault(label, set()).add(color)
    assert colors.keys() == {
        "OneCycleLR", "1: LinearLR()", "2: LinearLR(total_iters=9)", "Phases",
    }  # fmt: skip
    assert [len(each) for each in colors.values()] == [1, 1, 1, 1]
    assert len(set.union(*colors.values())) == 4
    panels = [(panel, label) for panel, label in lines if label in ("OneCycleLR", "Phases")]
    assert panels == [
        ("learning rate", "OneCycleLR"),
        ("momentum", "OneCycleLR"),
        ("momentum", "Phases"),
        ("weight decay", "Phases"),
    ]


def test_plot_of_groups_draws_groups_that_differ():
    base = {"lr": [0.1, 0.2], "weight_decay": [0.0, 0.0]}
    phases = Phases(lr=[{"duration": 3}], weight_decay=[{"to": 1, "duration": 9}])
    figure = plot(phases, base=base)
    assert [len(axis.get_lines()) for axis in figure.axes] == [2 + 0, 1 + 1]  # + phases


def test_plot_log_has_a_logarithmic_axis_for_the_lr_only():
    figure = plot(CYCLE, log=True)
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "linear"]
    zero = plot(LinearLR(), base={"lr": 0.0}, log=True)
    assert zero.axes[0].get_yscale() == "linear"


def test_plot_axis_is_logarithmic_by_default_for_an_exponential_sweep_only():
    sweep = Phases(lr=[{"from": 1e-4, "to": 1.0, "duration": 50, "shape": "exponential"}])
    decay = Phases(lr=[{"from": 1.0, "to": 1e-4, "duration": 50, "shape": "exponential"}])
    assert plot(sweep, steps=50).axes[0].get_yscale() == "log"
    assert plot(sweep, steps=50, log=False).axes[0].get_yscale() == "linear"
    assert plot(decay, steps=50).axes[0].get_yscale() == "linear"


def count_vertical_edges(figure):
    steps = figure.axes[0].get_lines()[0].get_xdata()
    return len(steps) - len(set(steps))


def test_plot_draws_ramps_as_lines_and_stairs_with_vertical_edges():
    assert count_vertical_edges(plot(LinearLR(total_iters=30), steps=40)) == 0
    assert count_vertical_edges(plot(CYCLE)) == 0
    assert count_vertical_edges(plot(StepLR(step_size=10), steps=40)) == 3


def test_plot_names_of_short_phases_do_not_overlap():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    lengths = (2, 2, 2, 40)
    shapes = [{"shape": "constant", "duration": length} for length in lengths]
    figure = plot(Phases(lr=shapes), steps=46)
    FigureCanvasAgg(figure).draw()
    names = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(names) == 4
    assert not [a for i, a in enumerate(names) for b in names[:i] if a.overlaps(b)]


def test_plot_names_of_phases_stay_inside_the_panel():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    shapes = [{"shape": "constant", "duration": length} for length in (38, 7, 1, 1)]
    figure = plot(Phases(lr=shapes), steps=46)
    FigureCanvasAgg(figure).draw()
    panel = figure.axes[0].get_window_extent()
    names = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(names) == 2  # the third phase has only the last step
    assert all(panel.x0 <= name.x0 and name.x1 <= panel.x1 for name in names)
    assert not names[0].overlaps(names[1])


def test_plot_length_is_that_of_the_run():
    decay = WarmupDecayLR(total_num_steps="1dur", warmup_num_steps="0.1dur", warmup_type="linear")
    ((values, _),) = read_lines(plot(decay, horizon=Horizon(total_steps=30))).values()
    assert len(values) == 30
    with pytest.raises(ValueError, match="requires the length of the run"):
        plot(decay)
    with pytest.raises(ValueError, match="steps to plot must be between 1 and 100,000"):
        plot(LinearLR(), steps=10**6)
    with pytest.raises(ValueError, match="requires at least one schedule"):
        plot()


def test_repr_shows_what_differs_from_the_defaults_and_can_be_evaluated():
    nested = SequentialLR(schedulers=[LinearLR(), StepLR(step_size="2ep")], milestones=[5])
    assert repr(nested) == (
        "SequentialLR(schedulers=[LinearLR(), StepLR(step_size='2ep')], milestones=[5])"
    )
    for schedule in (nested, CYCLE, AutoWU(steps_per_epoch=3, total_epochs=4)):
        assert eval(repr(schedule), vars(schedules) | dict(_all_schedules())) == schedule
    binder = attach(nested.parts[0], torch.optim.SGD(weights(), lr=0.3))
    assert repr(binder) == "ScheduleBinder(LinearLR(), step=0, lr=[0.1])"


def _all_schedules():
    return ((name, schedules.SCHEDULES[name]) for name in schedules.SCHEDULES)


def read_svg(text):
    """Return the points of each curve, and the positions of the vertical lines."""
    curves, marks = [], []
    for svg in re.findall("<svg.*?</svg>", text):
        root = ET.fromstring(svg)
        for each in root.iter("{http://www.w3.org/2000/svg}polyline"):
            pairs = (point.split(",") for point in each.get("points").split())
            curves.append([(float(x), float(y)) for x, y in pairs])
        marks += [float(x.get("x1")) for x in root.iter("{http://www.w3.org/2000/svg}line")]
    return curves, marks


def test_html_of_a_schedule_has_one_curve_per_hyperparameter():
    text = CYCLE._repr_html_()
    (lr, momentum), marks = read_svg(text)
    # The y axis points down: the peak of the lr is its smallest y.
    peak = min(range(len(lr)), key=lambda index: lr[index][1])
    assert momentum[peak][1] == max(y for _, y in momentum)
    assert 0 < peak < len(lr) - 1
    assert not marks
    assert "lr: 4e-07 to 0.1 over " in text
    groups, _ = read_svg(OneCycleLR(max_lr=[0.1, 0.2], total_steps=20)._repr_html_())
    assert len(groups) == 3  # two learning rates, one momentum


def test_html_of_a_scheduler_marks_the_current_step():
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    binder = attach("LinearLR", optimizer, horizon=Horizon(total_steps=11), at=5)
    (curve,), (mark,) = read_svg(binder._repr_html_())
    assert mark == pytest.approx(curve[5][0])
    assert "over 11 steps" in binder._repr_html_()


@pytest.mark.parametrize(
    ("schedule", "count"),
    [
        (CosineAnnealingLR(T_max="1dur"), 1),  # shown for a run of 1,000 steps
        (CosineAnnealingLR(T_max="3ep"), 0),
        (AutoWU(steps_per_epoch=3, total_epochs=4), 0),
    ],
)
def test_html_without_a_known_length_or_loss(schedule, count):
    text = schedule._repr_html_()
    assert text.startswith(f"<pre>{type(schedule).__name__}(")
    assert len(read_svg(text)[0]) == count

"""Laws that every registered schedule obeys, for whatever parameters it takes."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from schedules import SCHEDULES, FeedbackSchedule, Horizon, ScheduleError, from_config, trace
from tests.schedules.instances import instances

STEPS = 150
HORIZON = Horizon(total_steps=100, steps_per_epoch=10, samples_per_step=4)
BASE = {"lr": (0.1, 0.1), "momentum": (0.9, 0.9), "weight_decay": (0.01, 0.01)}


def listens(cls):
    """Whether a schedule has no shape of its own: it follows the loss."""
    return issubclass(cls, FeedbackSchedule)


every_schedule = pytest.mark.parametrize("cls", SCHEDULES.values(), ids=SCHEDULES)
drawing = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@every_schedule
@drawing
@given(data=st.data())
def test_values_are_finite_and_in_range(cls, data):
    schedule = data.draw(instances(cls))
    values = trace(schedule, STEPS, base=BASE, horizon=HORIZON)
    assert tuple(values) == schedule.drives
    for name, array in values.items():
        assert array.shape == (STEPS, 2)
        assert np.isfinite(array).all()
        assert (array >= 0).all()
        assert name != "momentum" or (array < 1).all()


@every_schedule
@drawing
@given(data=st.data())
def test_one_step_at_a_time_equals_the_array_to_the_last_bit(cls, data):
    schedule = data.draw(instances(cls))
    controller = schedule.bind(BASE, HORIZON)
    arrays = trace(schedule, STEPS, base=BASE, horizon=HORIZON)
    state = controller.init()
    for step in range(STEPS):
        for name, values in controller.values(state).items():
            assert arrays[name][step].tolist() == list(values)
        state = controller.update(state)


@every_schedule
@drawing
@given(data=st.data())
def test_a_walk_from_any_step_equals_the_walk_from_the_start(cls, data):
    schedule = data.draw(instances(cls))
    begin = data.draw(st.integers(0, STEPS - 1))
    for curves in schedule.bind(BASE, HORIZON).curves.values():
        walked = [
            piece.at(step)
            for piece in curves[0].pieces(begin, STEPS)
            for step in range(int(piece.begin), int(piece.end))
        ]
        assert walked == list(curves[0].values(STEPS))[begin:]


@every_schedule
@drawing
@given(data=st.data())
def test_json_to_schedule_to_json(cls, data):
    schedule = data.draw(instances(cls))
    text = json.dumps({"type": cls.type_name, "params": schedule.params()})
    assert from_config(json.loads(text)) == schedule


@pytest.mark.parametrize("cls", [cls for cls in SCHEDULES.values() if not listens(cls)])
@drawing
@given(data=st.data(), ratio=st.sampled_from([0.5, 2.0, 3.0]))
def test_the_scale_schedule_dilates_all_but_the_warmup(cls, data, ratio):
    """lr_r(t) == lr_1(t / r): exact where every scaled duration is whole."""
    schedule = data.draw(instances(cls, multiple=2))
    # A logarithm has no scale to dilate, and a growth that is no whole number truncates each cycle.
    assume(getattr(schedule, "warmup_type", None) != "log")
    assume(float(getattr(schedule, "t_mult", 1)).is_integer())
    scaled = Horizon(**vars(HORIZON) | {"scale_ratio": ratio, "scale_warmup": True})
    try:
        ours = schedule.bind(BASE, scaled).curves
    except ScheduleError:
        assume(False)
        raise
    plain = schedule.bind(BASE, HORIZON).curves
    stride = max(1, int(1 / ratio))
    for name, curves in plain.items():
        for step in range(0, 60, stride * 2):
            at = step * ratio
            if at == int(at):
                expected = curves[0](step)
                assert ours[name][0](int(at)) == pytest.approx(expected, rel=1e-9, abs=1e-12)

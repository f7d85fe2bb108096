"""Laws that every registered schedule obeys, for whatever parameters it takes."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schedules import SCHEDULES, from_config, trace
from tests.schedules.instances import instances

STEPS = 150
BASE = {"lr": (0.1, 0.1), "momentum": (0.9, 0.9), "weight_decay": (0.01, 0.01)}

every_schedule = pytest.mark.parametrize("cls", SCHEDULES.values(), ids=SCHEDULES)
drawing = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@every_schedule
@drawing
@given(data=st.data())
def test_values_are_finite_and_in_range(cls, data):
    schedule = data.draw(instances(cls))
    values = trace(schedule, STEPS, base=BASE)
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
    controller = schedule.bind(BASE)
    arrays = trace(schedule, STEPS, base=BASE)
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
    for curves in schedule.curves(BASE).values():
        walked = [
            piece.at(step)
            for piece in curves[0].pieces(begin, STEPS)
            for step in range(piece.begin, int(piece.end))
        ]
        assert walked == list(curves[0].values(STEPS))[begin:]


@every_schedule
@drawing
@given(data=st.data())
def test_json_to_schedule_to_json(cls, data):
    schedule = data.draw(instances(cls))
    text = json.dumps({"type": cls.__name__, "params": schedule.params()})
    assert from_config(json.loads(text)) == schedule

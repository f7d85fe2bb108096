"""Properties that every registered schedule has with any valid parameters."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import schedules
from schedules import (
    SCHEDULES,
    Horizon,
    ScheduleError,
    attach,
    from_config,
    trace,
)
from schedules.core.fields import Duration, read_fields
from tests.testing.schedule_bounds import LR_LEVELS, UNBOUNDED, bounds_of
from tests.testing.schedule_instances import instances

STEPS = 150
HORIZON = Horizon(total_steps=100, steps_per_epoch=10, samples_per_step=4)
BASE = {"lr": (0.1, 0.1), "momentum": (0.9, 0.9), "weight_decay": (0.01, 0.01)}


NO_WARMUP = Duration(warmup=False)


every_schedule = pytest.mark.parametrize("cls", SCHEDULES.values(), ids=SCHEDULES)
every_schedule_without_feedback = pytest.mark.parametrize(
    "cls",
    [cls for cls in SCHEDULES.values() if cls.feedback is None],
    ids=lambda cls: cls.type_name,
)
drawing = settings(
    max_examples=settings.default.max_examples // 6,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@every_schedule
@drawing
@given(data=st.data())
def test_schedule_values_are_finite_and_within_the_declared_bounds(cls, data):
    schedule = data.draw(instances(cls))
    values = trace(schedule, STEPS, base=BASE, horizon=HORIZON)
    assert tuple(values) == schedule.hyperparameters
    resolved = schedule.resolve(HORIZON).per_group(2)[0]
    for name, array in values.items():
        assert array.shape == (STEPS, 2)
        assert np.isfinite(array).all()
        assert (array >= 0).all()
        assert name != "momentum" or (array < 1).all()
        low, high = bounds_of(resolved, name, BASE["lr"][0])
        assert low * (1 - 1e-9) <= array[:, 0].min()
        assert array[:, 0].max() <= high * (1 + 1e-9)


@every_schedule_without_feedback
@drawing
@given(data=st.data())
def test_schedule_is_constant_after_its_length(cls, data):
    schedule = data.draw(instances(cls))
    length = schedule.resolve(HORIZON).length
    if length is not None and length < 1000:
        for array in trace(schedule, length + 50, base=BASE, horizon=HORIZON).values():
            assert (array[length + 1 :] == array[length + 1]).all()


def test_length_of_a_schedule_is_that_of_its_config():
    cycle = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 20}
    assert from_config({"type": "OneCycle", "params": cycle}).length == 40
    decay = {"decay_step_size": 5, "decay_lr_rate": 0.1}
    assert from_config({"type": "OneCycle", "params": cycle | decay}).length is None
    assert schedules.WarmupCosineLR(total_num_steps=30, warmup_num_steps=3).length == 30
    assert schedules.WarmupLR(warmup_num_steps=3).length is None
    last = {"type": "CosineAnnealingLR", "params": {"T_max": 7}}
    parts = [{"type": "LinearLR"}, last]
    assert schedules.SequentialLR(schedulers=parts, milestones=[5]).length == 12
    assert schedules.ChainedScheduler(schedulers=parts).length is None


def test_bounds_are_declared_for_every_schedule():
    assert LR_LEVELS.keys() | UNBOUNDED == set(SCHEDULES)


OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01),
}


def read_value(name, group):
    """Return the current value of a hyperparameter in a param group."""
    return group["betas"][0] if name == "momentum" and "betas" in group else group[name]


@every_schedule_without_feedback
@drawing
@given(data=st.data(), optimizer=st.sampled_from(sorted(OPTIMIZERS)), groups=st.integers(1, 2))
def test_binder_step_by_step_equals_trace_bitwise(cls, data, optimizer, groups):
    """The binder has fast paths that depend on the optimizer and the formula; all must agree."""
    schedule = data.draw(instances(cls))
    lists = [len(value) for value in vars(schedule).values() if isinstance(value, tuple)]
    params = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(groups)]
    chosen = OPTIMIZERS[optimizer](params)
    base = {name: values[:groups] for name, values in BASE.items()}
    try:
        arrays = trace(schedule, STEPS, base=base, horizon=HORIZON)
    except ValueError:
        assert any(length != groups for length in lists)  # a list for a different number of groups
        return
    binder = attach(schedule, chosen, horizon=HORIZON)
    for step in range(STEPS):
        for name, array in arrays.items():
            values = [read_value(name, group) for group in chosen.param_groups]
            assert array[step].tolist() == values
        binder.step()


@every_schedule
def test_schedule_is_an_attribute_of_the_package(cls):
    assert getattr(schedules, cls.type_name) is cls


DIFFERENT_GROUPS = {"lr": (1.0, 0.1), "momentum": (0.9, 0.9), "weight_decay": (0.1, 0.0)}


def follow_advice(block, message):
    """Fix a block as the message recommends: use a list instead of one number for all groups."""
    parts = [block, *block["params"].get("schedulers", ())]
    field = re.search(r"`(\w+)` must be a list with one number per param group", message)
    if field is None:
        assert '"relative": true' in message, message
        (params,) = (part["params"] for part in parts if part["type"] == "Phases")
        assert "relative" not in params
        params["relative"] = True
        return
    (params,) = (part["params"] for part in parts if field[1] in part["params"])
    params[field[1]] = [params[field[1]], params[field[1]] / 10]


def trace_different_groups(block, attempts=0):
    try:
        return trace(block, 50, base=DIFFERENT_GROUPS, horizon=HORIZON)
    except ValueError as error:
        assert attempts < 10
        follow_advice(block, str(error))
        return trace_different_groups(block, attempts + 1)


@every_schedule
def test_schedule_different_groups_keep_different_values(cls):
    """One number for all groups would remove per-group learning rates or enable weight decay."""
    block = copy.deepcopy({"type": cls.type_name, "params": dict(cls.example)})
    assert len(trace(block, 50, base=BASE, horizon=HORIZON)["lr"]) == 50
    values = trace_different_groups(block)
    for name in values.keys() - {"momentum"}:
        assert (values[name][:, 0] != values[name][:, 1]).any(), name


@every_schedule
@drawing
@given(data=st.data())
def test_curve_pieces_from_any_step_equal_pieces_from_step_0(cls, data):
    schedule = data.draw(instances(cls))
    start = data.draw(st.integers(0, STEPS - 1))
    for curves in schedule.build_curves(BASE, HORIZON).values():
        values = [
            piece.formula(step)
            for piece in curves[0].pieces(start, STEPS)
            for step in range(int(piece.start), int(piece.end))
        ]
        assert values == list(curves[0].values(STEPS))[start:]


@every_schedule
@drawing
@given(data=st.data())
def test_schedule_json_round_trip_is_equal(cls, data):
    schedule = data.draw(instances(cls))
    text = json.dumps({"type": cls.type_name, "params": schedule.params()})
    assert from_config(json.loads(text)) == schedule


@every_schedule_without_feedback
@drawing
@given(data=st.data(), ratio=st.sampled_from([0.5, 2.0, 3.0]))
def test_scale_ratio_with_warmup_stretches_the_whole_curve(cls, data, ratio):
    """lr_r(t) == lr_1(t / r), if every scaled duration is a whole number of steps."""
    schedule = data.draw(instances(cls, multiple=2))
    # A logarithmic ramp and one that counts from 1 cannot be stretched, and a fractional growth
    # truncates the cycles.
    assume(getattr(schedule, "warmup_type", None) != "log")
    assume(not getattr(schedule, "one_based_warmup", False))
    assume(float(getattr(schedule, "t_mult", 1)).is_integer())
    scaled = Horizon(**vars(HORIZON) | {"scale_ratio": ratio, "scale_warmup": True})
    try:
        ours = schedule.build_curves(BASE, scaled)
    except ScheduleError:
        assume(False)
        raise
    plain = schedule.build_curves(BASE, HORIZON)
    stride = max(1, int(1 / ratio))
    for name, curves in plain.items():
        for step in range(0, 60, stride * 2):
            at = step * ratio
            if at == int(at):
                expected = curves[0](step)
                assert ours[name][0](int(at)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def warmup_fields(cls):
    return [
        name for name, field in read_fields(cls).items() if (field.duration or NO_WARMUP).warmup
    ]


@pytest.mark.parametrize("cls", [cls for cls in SCHEDULES.values() if warmup_fields(cls)])
@drawing
@given(data=st.data(), ratio=st.sampled_from([0.5, 2.0, 3.0]))
def test_scale_ratio_without_warmup_keeps_the_warmup(cls, data, ratio):
    schedule = data.draw(instances(cls, multiple=2))
    assume(not getattr(schedule, "scale_warmup", False))
    # A warmup that is a fraction of the run follows the run.
    assume(not any(str(getattr(schedule, name)).endswith("dur") for name in warmup_fields(cls)))
    plain = schedule.resolve(HORIZON)
    horizon = Horizon(**vars(HORIZON) | {"scale_ratio": ratio})
    try:
        scaled = schedule.resolve(horizon)
    except ScheduleError:
        assume(False)  # the scaled run is shorter than its warmup
        raise
    for name, field in read_fields(cls).items():
        before, after = getattr(plain, name), getattr(scaled, name)
        if cls.has_rate_per_step and field.duration is not None:
            continue  # the curves are stretched instead of the durations
        if field.duration is None or before is None or field.duration.warmup:
            assert after == before
        else:
            steps = before if isinstance(before, tuple) else (before,)
            expected = tuple(int(each * ratio) for each in steps)
            assert after == (expected if isinstance(before, tuple) else expected[0])
    end = max(getattr(plain, name) or 0 for name in warmup_fields(cls))
    for name, curves in schedule.build_curves(BASE, horizon).items():
        if name == "lr":
            before = schedule.build_curves(BASE, HORIZON)[name][0]
            expected = pytest.approx(list(before.values(end)), rel=1e-9, abs=1e-12)
            assert list(curves[0].values(end)) == expected

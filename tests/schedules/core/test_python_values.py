"""Parameters that come from Python code: NumPy numbers, tensors, ranges and schedules."""

import numpy as np
import pytest
import torch

import schedules
from schedules import Horizon, ScheduleError


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("CosineAnnealingLR", {"T_max": np.int64(10)}, {"T_max": 10}),
        ("CosineAnnealingLR", {"T_max": 5, "eta_min": torch.tensor(0.5)}, {"eta_min": 0.5}),
        ("LinearLR", {"start_factor": np.float32(0.5)}, {"start_factor": 0.5}),
        (
            "CosineAnnealingLR",
            {"T_max": 5, "eta_min": np.array([0.5, 0.25])},
            {"eta_min": [0.5, 0.25]},
        ),
        ("MultiStepLR", {"milestones": range(30, 90, 30)}, {"milestones": [30, 60]}),
        ("MultiStepLR", {"milestones": [np.int32(3), torch.tensor(4)]}, {"milestones": [3, 4]}),
    ],
)
def test_schedule_accepts_numbers_of_numpy_and_torch(name, params, expected):
    schedule = schedules.from_config({"type": name, "params": params})
    assert schedule.params().items() >= expected.items()
    (value, *_) = schedule.params().values()
    assert type(value) in (int, float, list)


def test_composite_accepts_a_tuple_of_schedules():
    parts = (schedules.LinearLR(total_iters=2), schedules.CosineAnnealingLR(T_max=4))
    blocks = [{"type": each.type_name, "params": each.params()} for each in parts]
    made = schedules.SequentialLR(schedulers=parts, milestones=(2,))
    assert made == schedules.SequentialLR(schedulers=blocks, milestones=[2])


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        (
            "MultiStepLR",
            {"milestones": [5, -1]},
            r"`milestones\[1\]` must be .* at least 0, got -1",
        ),
        (
            "Phases",
            {"lr": [{"to": 1, "duration": 4}, {"shape": "cos", "to": 0, "duration": 4}]},
            r"`lr\[1\].shape` must be one of .*, got 'cos'",
        ),
        ("OneCycleLR", {"max_lr": [0.1, "a"], "total_steps": 9}, r"`max_lr\[1\]` must be a number"),
    ],
)
def test_schedule_invalid_item_is_named(name, params, message):
    with pytest.raises(ScheduleError, match=message):
        schedules.from_config({"type": name, "params": params})


def test_schedule_duration_of_0_steps_in_a_short_run_is_named():
    schedule = schedules.WarmupDecayLR(warmup_num_steps="0.03dur", total_num_steps="1dur")
    with pytest.raises(
        ScheduleError, match=r"`warmup_num_steps`: '0.03dur' converts to 0 steps in this"
    ):
        schedule.resolve(Horizon(total_steps=20))


def test_milestone_of_0_applies_the_factor_from_the_start():
    block = {"type": "MultiStepLR", "params": {"milestones": [0, 2], "gamma": 0.5}}
    assert schedules.trace(block, 4, base={"lr": 1.0})["lr"][:, 0].tolist() == [
        0.5,
        0.5,
        0.25,
        0.25,
    ]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("CosineAnnealingWithWarmupScheduler", {"t_warmup": 4, "t_max": 4}),
        ("LinearWithWarmupScheduler", {"t_warmup": 4, "t_max": 4}),
        ("PolynomialWithWarmupScheduler", {"t_warmup": 4, "t_max": 4}),
        ("cosine_schedule_with_warmup", {"warmup_steps": 4, "max_steps": 4}),
        ("polynomial_decay_schedule_with_warmup", {"warmup_steps": 4, "max_steps": 4}),
    ],
)
def test_warmup_as_long_as_the_run_reaches_the_peak_and_keeps_it(name, params):
    values = schedules.trace({"type": name, "params": params}, 7, base={"lr": 1.0})["lr"][:, 0]
    assert values.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_schedule_called_returns_the_lr_at_a_step_or_at_an_array_of_steps():
    schedule = schedules.LinearLR(start_factor=0.0, total_iters="0.5dur")
    horizon = Horizon(total_steps=8)
    assert schedule(2, lr=1.0, horizon=horizon) == 0.5
    assert schedule(np.array([4, 0]), lr=1.0, horizon=horizon).tolist() == [1.0, 0.0]
    decay = schedules.Phases(weight_decay=[{"to": 0.1, "duration": 4}])
    with pytest.raises(ValueError, match="Only a learning-rate schedule .* only weight_decay"):
        decay(2)

"""Phases, and the warmups that count from 1, against other libraries and independent arithmetic."""

import math

import pytest
import torch

from schedules import (
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    Horizon,
    InverseSquareRoot,
    LinearWithWarmupScheduler,
    MultiStepWithWarmupScheduler,
    Phases,
    PolynomialWithWarmupScheduler,
    ReduceLROnPlateau,
    ScheduleError,
    WarmupStableDecay,
    attach,
    from_config,
)
from tests.schedules.test_torch_scheduler import run, weights


def test_phases_inverse_sqrt_equals_the_schedule_of_transformers():
    transformers = pytest.importorskip("transformers")
    warmup, total, peak = 4, 20, 0.1
    ours, theirs = (torch.optim.SGD(weights(), lr=peak) for _ in range(2))
    end = peak * math.sqrt(warmup / total)
    phases = Phases(
        lr=[
            {"from": 0, "to": peak, "duration": warmup},
            {"shape": "inverse-sqrt", "to": end, "duration": total - warmup},
        ]
    )
    peer = transformers.get_inverse_sqrt_schedule(theirs, num_warmup_steps=warmup)
    rows = zip(run(ours, attach(phases, ours), total), run(theirs, peer, total), strict=True)
    for group, other in rows:
        assert group[0]["lr"] == pytest.approx(other[0]["lr"], rel=1e-12)
    assert phases(total) == phases(2 * total) == end


def test_phases_inverse_sqrt_rises_to_a_higher_end():
    phases = Phases(lr=[{"shape": "inverse-sqrt", "from": 0.1, "to": 0.2, "duration": 3}])
    values = [phases(step) for step in range(4)]
    assert values == pytest.approx([0.1 / math.sqrt(1 - 0.25 * step) for step in range(4)])


@pytest.mark.parametrize("ends", [{"from": 0.0, "to": 0.1}, {"from": 0.1, "to": 0.0}])
def test_phases_inverse_sqrt_from_or_to_0_is_rejected(ends):
    with pytest.raises(ScheduleError, match="must not start or end at 0, because its shape is inv"):
        Phases(lr=[{"shape": "inverse-sqrt", "duration": 3, **ends}])
    with pytest.raises(ValueError, match="A phase of `lr` with the shape inverse-sqrt must not"):
        Phases(lr=[{"shape": "inverse-sqrt", "duration": 3, "to": 0.1}])(0, lr=0.0)


WARMUPS = [
    ConstantWithWarmupScheduler(t_warmup="4ba", alpha=1.0),
    CosineAnnealingWithWarmupScheduler(t_warmup=4, t_max=10),
    LinearWithWarmupScheduler(t_warmup=4, t_max=10),
    MultiStepWithWarmupScheduler(t_warmup=4, milestones=[8]),
    PolynomialWithWarmupScheduler(t_warmup=4, t_max=10),
    InverseSquareRoot(warmup_steps=4),
    WarmupStableDecay(warmup_steps=4, total_steps=10, decay_steps=2),
    from_config(
        {"type": "cosine_schedule_with_warmup", "params": {"warmup_steps": 4, "max_steps": 10}}
    ),
    from_config(
        {
            "type": "polynomial_decay_schedule_with_warmup",
            "params": {"warmup_steps": 4, "max_steps": 10},
        }
    ),
    ReduceLROnPlateau(warmup_steps=4),
]


@pytest.mark.parametrize("schedule", WARMUPS, ids=lambda schedule: schedule.type_name)
def test_one_based_warmup_is_k_plus_1_over_n(schedule):
    params = schedule.params()
    shifted = type(schedule)(**params, one_based_warmup=True)
    assert [schedule(step) for step in range(5)] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    lrs = [shifted(step) for step in range(5)]
    assert lrs == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert [shifted(step) for step in range(5, 12)] == [schedule(step) for step in range(5, 12)]


def test_one_based_warmup_of_one_step_or_none_starts_at_the_peak():
    for steps in (0, 1, "2sp"):
        schedule = ConstantWithWarmupScheduler(t_warmup=steps, alpha=1.0, one_based_warmup=True)
        horizon = Horizon(samples_per_step=4)
        assert [schedule(step, horizon=horizon) for step in range(3)] == [0.1, 0.1, 0.1]

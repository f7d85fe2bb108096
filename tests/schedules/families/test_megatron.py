"""OptimizerParamScheduler sets the weight decay only if its parameters say so."""

import pytest
import torch

from schedules import OptimizerParamScheduler, ScheduleError, attach

PARAMS = {"max_lr": 0.1, "lr_decay_steps": 10}


def adamw():
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=0.25)


def test_optimizer_param_scheduler_keeps_the_weight_decay_by_default():
    optimizer = adamw()
    binder = attach("OptimizerParamScheduler", optimizer, **PARAMS)
    for _ in range(3):
        assert optimizer.param_groups[0]["weight_decay"] == 0.25
        optimizer.step()
        binder.step()


def test_optimizer_param_scheduler_with_end_wd_starts_at_0():
    optimizer = adamw()
    binder = attach("OptimizerParamScheduler", optimizer, **PARAMS, end_wd=0.5, wd_incr_steps=2)
    for expected in (0.0, 0.25, 0.5, 0.5):
        assert optimizer.param_groups[0]["weight_decay"] == expected
        optimizer.step()
        binder.step()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"wd_incr_steps": 5}, "`wd_incr_steps` has no effect without `end_wd`"),
        ({"start_wd": 0.1}, "`end_wd` must be at least `start_wd`"),
    ],
)
def test_optimizer_param_scheduler_incomplete_weight_decay_is_rejected(params, message):
    with pytest.raises(ScheduleError, match=message):
        OptimizerParamScheduler(**PARAMS, **params)

"""Memory of long runs: no schedule may keep an object per step."""

import gc
import logging
import math
import sys
import warnings

import pytest
import torch

from schedules import SCHEDULES, Horizon, attach
from schedules.families import custom

STEPS = 2500
CUSTOM = {
    "a function": (f"{__name__}:halve", {}),
    "LambdaLR": ("LambdaLR", {"lr_lambda": f"{__name__}:halve"}),
    "torch's CyclicLR": (
        "torch.optim.lr_scheduler:CyclicLR",
        {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 15, "cycle_momentum": False},
    ),
    "torch's restarts": (
        "torch.optim.lr_scheduler:CosineAnnealingWarmRestarts",
        {"T_0": 7, "T_mult": 2},
    ),
}
CASES = {name: (name, dict(cls.example)) for name, cls in SCHEDULES.items()} | CUSTOM


def halve(step):
    return 0.5 ** (step / 1000)


def run(binder, steps):
    """Run some steps. The loss, which feedback schedules receive, decreases and then increases."""
    feedback = binder.schedule.feedback is not None
    for step in range(steps):
        loss = 1 + math.cos(step / 300)
        binder.step(**({"loss": loss} if feedback else {}))


@pytest.fixture(scope="module")
def frozen_heap():
    """Exclude the existing objects from garbage collections, which would dominate the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen_heap")
@pytest.mark.parametrize("name", CASES)
def test_schedule_in_a_long_run_keeps_no_object_per_step(name, caplog):
    caplog.set_level(logging.WARNING, logger="onecycle")  # pytest keeps what is logged
    type_name, params = CASES[name]
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01)
    horizon = Horizon(total_steps=2 * STEPS, steps_per_epoch=10, samples_per_step=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about steps of the schedule without optimizer steps
        binder = attach(type_name, optimizer, horizon=horizon, **params)
        run(binder, STEPS)
        gc.collect()  # garbage of earlier tests
        before = sys.getallocatedblocks()
        run(binder, STEPS)
        gc.collect()
    assert sys.getallocatedblocks() - before < STEPS // 5


def test_wrapped_scheduler_at_a_step_before_its_record_returns_the_same_value():
    name, params = CUSTOM["torch's restarts"]
    steps = 3 * custom._MAX_RECORDED
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    binder = attach(name, torch.optim.SGD(groups, lr=0.1), **params)
    curves = binder.controller.curves["lr"]
    expected = list(curves[0].values(steps))
    for step in (steps - 1, 0, steps // 2, 5, steps - 2):
        assert [curve(step) for curve in curves] == [expected[step]] * 2

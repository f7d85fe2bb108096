"""ReduceLROnPlateau: comparison with PyTorch's scheduler, and resume."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import schedules


def optimizers():
    for _ in range(2):
        yield torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)


@given(
    metrics=st.lists(
        st.floats(-5, 5) | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=60
    ),
    params=st.fixed_dictionaries(
        {
            "mode": st.sampled_from(["min", "max"]),
            "factor": st.sampled_from([0.1, 0.5, 0.9]),
            "patience": st.integers(0, 4),
            "threshold": st.sampled_from([0.0, 1e-4, 0.2]),
            "threshold_mode": st.sampled_from(["rel", "abs"]),
            "cooldown": st.integers(0, 3),
            "min_lr": st.sampled_from([0.0, 0.02]),
        }
    ),
)
@settings(deadline=None, max_examples=2 * settings.default.max_examples)
def test_plateau_any_metrics_match_torch(metrics, params):
    mine, theirs = optimizers()
    ours = schedules.attach("ReduceLROnPlateau", mine, **params)
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **params)
    for metric in metrics:
        ours.step(metric)
        peer.step(metric)
        assert ours.get_last_lr() == pytest.approx(peer.get_last_lr(), rel=1e-12)


def test_plateau_steps_without_metric_are_ignored():
    optimizer, _ = optimizers()
    scheduler = schedules.attach("ReduceLROnPlateau", optimizer, patience=0)
    for metric in (1.0, None, None, 1.0, None):
        scheduler.step(metric=metric)
    assert scheduler.get_last_lr() == [pytest.approx(0.01)]
    assert scheduler.decision.step == 4


def test_plateau_resumed_has_the_same_lrs_as_uninterrupted():
    first, second = optimizers()
    metrics = [1.0, 0.5, *[0.6] * 20]
    whole = schedules.attach("ReduceLROnPlateau", first, patience=3)
    rows = []
    for step, metric in enumerate(metrics):
        if step == 9:
            state = json.loads(json.dumps(whole.state_dict()))
        whole.step(metric)
        rows.append(whole.get_last_lr())
    resumed = schedules.attach("ReduceLROnPlateau", second, patience=3)
    resumed.load_state_dict(state)
    for metric, row in zip(metrics[9:], rows[9:], strict=True):
        resumed.step(metric)
        assert resumed.get_last_lr() == row


def test_plateau_factor_of_1_is_rejected():
    with pytest.raises(schedules.ScheduleError, match="`factor` must be less than 1"):
        schedules.ReduceLROnPlateau(factor=1.0)

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


@pytest.mark.parametrize("one_based", [False, True])
def test_plateau_after_its_warmup_matches_torch(one_based):
    mine, theirs = optimizers()
    rules = {"patience": 1, "factor": 0.5, "cooldown": 1}
    ours = schedules.attach(
        {
            "type": "ReduceLROnPlateau",
            "params": {"warmup_steps": 4, "one_based_warmup": one_based, **rules},
        },
        mine,
    )
    lrs = [ours.get_last_lr()[0]]
    for _ in range(4):
        mine.step()
        ours.step(metric=0.0)  # would be the best value, if it counted
        lrs.append(ours.get_last_lr()[0])
    numerators = (1, 2, 3, 4, 4) if one_based else (0, 1, 2, 3, 4)
    assert lrs == pytest.approx([0.1 * each / 4 for each in numerators])
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **rules)
    for metric in (3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        ours.step(metric)
        ours.step()
        peer.step(metric)
        assert ours.get_last_lr() == pytest.approx(peer.get_last_lr(), rel=1e-12)
    assert peer.get_last_lr()[0] < 0.1


def test_plateau_resumed_in_its_warmup_has_the_same_lrs():
    first, second = optimizers()
    params = {"patience": 0, "warmup_steps": "6ba"}
    whole = schedules.attach("ReduceLROnPlateau", first, **params)
    rows = []
    for step in range(12):
        if step == 3:
            state = json.loads(json.dumps(whole.state_dict()))
            groups = first.state_dict()["param_groups"]
        first.step()
        whole.step(1.0)
        rows.append(whole.get_last_lr())
    second.load_state_dict({"state": {}, "param_groups": groups})
    resumed = schedules.attach("ReduceLROnPlateau", second, **params)
    resumed.load_state_dict(state)
    for row in rows[3:]:
        second.step()
        resumed.step(1.0)
        assert resumed.get_last_lr() == row
    assert rows[5] == [0.1]
    assert rows[-1][0] < 0.1


def test_plateau_attached_again_warms_up_to_the_initial_lr():
    """Not to 0, the value that the first warmup starts from."""
    optimizer, _ = optimizers()
    for _ in range(2):
        scheduler = schedules.attach("ReduceLROnPlateau", optimizer, warmup_steps=2)
        assert scheduler.get_last_lr() == [0.0]
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [0.1]

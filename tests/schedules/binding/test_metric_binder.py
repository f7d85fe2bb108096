"""Schedules that depend on a metric: in other libraries' trainers, and beside other writers."""

import json
import math
import warnings

import pytest
import torch

from schedules import ScheduleBinder, attach
from tests.schedules.test_torch_scheduler import weights

PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau


def sgd(*lrs):
    return torch.optim.SGD([{"params": weights(), "lr": lr} for lr in lrs or (0.1,)], lr=0.1)


def test_plateau_is_an_instance_of_torchs_class_and_steps_like_it():
    """HF Trainer and Lightning pass a metric only to such an instance."""
    optimizer, peer = sgd(), sgd()
    ours = attach("ReduceLROnPlateau", optimizer, patience=1, cooldown=2)
    theirs = PLATEAU(peer, patience=1, cooldown=2)
    assert isinstance(ours, PLATEAU)
    assert isinstance(ours, ScheduleBinder)
    assert (ours.mode, ours.patience, ours.best) == (theirs.mode, theirs.patience, theirs.best)
    for metric in (1.0, 0.5, 0.6, 0.7, 0.8, 0.9):
        ours.step(metrics=metric)
        theirs.step(metrics=metric)
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr())
        assert (ours.best, ours.num_bad_epochs) == (theirs.best, theirs.num_bad_epochs)
        assert (ours.cooldown_counter, ours.in_cooldown) == (
            theirs.cooldown_counter,
            theirs.in_cooldown,
        )


def test_plateau_best_of_the_mode_max_is_minus_infinity_before_the_first_metric():
    assert attach("ReduceLROnPlateau", sgd(), mode="max").best == -math.inf


def test_plateau_multiplies_the_current_lr_and_leaves_it_otherwise():
    optimizer = sgd()
    scheduler = attach("ReduceLROnPlateau", optimizer, patience=0)
    for lr in (0.01, 0.02, 0.5):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        scheduler.step(1.0 if lr == 0.01 else None)
        assert scheduler.get_last_lr() == [lr]
    scheduler.step(2.0)
    assert scheduler.get_last_lr() == [0.05]


def test_plateau_resumed_keeps_an_lr_that_was_set_between_metrics():
    optimizer = sgd()
    scheduler = attach("ReduceLROnPlateau", optimizer, patience=0)
    scheduler.step(1.0)
    optimizer.param_groups[0]["lr"] = 0.5
    saved = json.loads(json.dumps((scheduler.state_dict(), optimizer.state_dict()["param_groups"])))
    resumed = sgd()
    resumed.load_state_dict({"state": {}, "param_groups": saved[1]})
    other = attach("ReduceLROnPlateau", resumed, patience=0)
    other.load_state_dict(saved[0])
    assert other.get_last_lr() == [0.5]
    other.step(2.0)
    assert other.get_last_lr() == [0.05]


def test_plateau_reduces_the_lr_of_a_group_that_was_added_later():
    optimizer = sgd()
    scheduler = attach("ReduceLROnPlateau", optimizer, patience=0, factor=0.5)
    scheduler.step(1.0)
    optimizer.add_param_group({"params": weights(), "lr": 0.5})
    scheduler.step(2.0)
    assert scheduler.get_last_lr() == [0.05, 0.25]


def test_plateau_with_a_list_rejects_an_added_group_and_changes_nothing():
    optimizer = sgd(0.1, 0.2)
    scheduler = attach("ReduceLROnPlateau", optimizer, patience=0, min_lr=[0.01, 0.02])
    scheduler.step(1.0)
    optimizer.add_param_group({"params": weights(), "lr": 0.5})
    with pytest.raises(ValueError, match=r"Param group 2 was added .* `min_lr` must be"):
        scheduler.step(2.0)
    assert scheduler.get_last_lr() == [0.1, 0.2, 0.5]


def test_plateau_warns_after_many_steps_without_a_metric():
    scheduler = attach("ReduceLROnPlateau", sgd())
    scheduler.optimizer.step()
    for _ in range(999):
        scheduler.step()
    with pytest.warns(UserWarning, match="ReduceLROnPlateau has not received a metric in 1000"):
        scheduler.step()
    other = attach("ReduceLROnPlateau", sgd())
    other.optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1100):
            other.step(1.0 if step == 5 else None)


def take_turns(first, second, steps=2):
    for _ in range(steps):
        first.optimizer.step()
        first.step()
        second.step(*([1.0] if second.schedule.feedback else []))


def test_two_schedules_of_one_hyperparameter_that_take_turns_warn():
    optimizer = sgd()
    first, second = (attach("ExponentialLR", optimizer, gamma=gamma) for gamma in (0.9, 0.5))
    with pytest.warns(UserWarning, match="Two schedules set lr of the same optimizer") as caught:
        take_turns(first, second, steps=4)
    assert len(caught) == 2, "each schedule warns once"


def test_a_warmup_that_overwrites_the_reductions_of_a_plateau_warns():
    optimizer = sgd()
    warmup = attach("LinearLR", optimizer, total_iters=2)
    plateau = attach("ReduceLROnPlateau", optimizer, patience=1)
    with pytest.warns(UserWarning, match="Two schedules set lr"):
        take_turns(warmup, plateau, steps=5)


def test_schedules_of_different_hyperparameters_or_one_after_the_other_do_not_warn():
    optimizer = sgd()
    decay = {"weight_decay": [{"from": 0.0, "to": 0.1, "duration": 5}]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_turns(attach("LinearLR", optimizer), attach("Phases", optimizer, **decay))
        warmup, main = attach("LinearLR", optimizer), attach("StepLR", optimizer, step_size=2)
        for step in range(8):
            optimizer.step()
            (warmup if step < 4 else main).step()


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("patience", 5, "Attach the schedule again with `patience=5`"),
        ("mode", "max", "Attach the schedule again with `mode='max'`"),
        ("best", 0.5, "To restart the schedule from the current learning rate, attach it again"),
        ("num_bad_epochs", 0, "To restore an earlier state, call load_state_dict"),
    ],
)
def test_attribute_of_torchs_plateau_that_a_script_sets_is_an_error_with_a_fix(name, value, fix):
    scheduler = attach("ReduceLROnPlateau", sgd())
    with pytest.raises(AttributeError) as error:
        setattr(scheduler, name, value)
    assert fix in str(error.value)


def test_plateau_attached_again_with_the_earlier_state_continues_with_a_new_patience():
    """This is the fix that the error of a script that sets `patience` names."""
    old = attach("ReduceLROnPlateau", sgd(), patience=9)
    for _ in range(3):
        old.step(1.0)
    new = attach("ReduceLROnPlateau", old.optimizer, patience=2)
    new.load_state_dict(old.state_dict(), override=True)
    new.step(1.0)
    assert new.get_last_lr() == [pytest.approx(0.01)]


@pytest.mark.parametrize("call", [lambda s: s.step(1.0, 3), lambda s: s.step(1.0, epoch=3)])
def test_plateau_step_with_torchs_deprecated_epoch_is_an_error(call):
    with pytest.raises(ValueError, match="must be called without an epoch, got `epoch` 3"):
        call(attach("ReduceLROnPlateau", sgd()))

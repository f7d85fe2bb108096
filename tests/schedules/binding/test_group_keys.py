"""Keys that other libraries put into param groups: lr_scale, lr_mult, wd_mult, max_lr, min_lr."""

import math
import pickle

import pytest
import torch

import schedules
from schedules import attach
from tests.schedules.test_torch_scheduler import CYCLE, weights


def build(*groups, **defaults):
    return torch.optim.AdamW([{"params": weights(), **group} for group in groups], **defaults)


def run(optimizer, binder, steps, key="lr"):
    """Return the values of each group before each step."""
    rows = []
    for _ in range(steps):
        rows.append([group[key] for group in optimizer.param_groups])
        optimizer.step()
        binder.step()
    return rows


@pytest.mark.parametrize("key", ["lr_scale", "lr_mult"])
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("OneCycle", CYCLE),
        ("CosineAnnealingLR", {"T_max": 5, "eta_min": 0.01}),
        ("StepLR", {"step_size": 2}),
        ("LinearLR", {"total_iters": 3}),
    ],
)
def test_attach_a_factor_in_a_group_multiplies_the_lr_as_in_timm(key, name, params):
    """timm's schedulers compute one value for all groups, and multiply it by the factor."""
    optimizer = build({key: 0.5}, {}, {key: 0.1}, lr=0.1)
    plain = build({}, lr=0.1)
    binder, other = attach(name, optimizer, **params), attach(name, plain, **params)
    expected = [[value * 0.5, value, value * 0.1] for (value,) in run(plain, other, 8)]
    assert run(optimizer, binder, 8) == expected
    assert binder.base_lrs == [0.1, 0.1, 0.1]


def test_attach_a_factor_of_the_weight_decay_multiplies_it_as_in_megatron():
    optimizer = build({"wd_mult": 0.0}, {}, lr=0.1, weight_decay=0.1)
    ramp = [{"from": 0.0, "to": 0.2, "duration": 4}]
    binder = attach("Phases", optimizer, weight_decay=ramp)
    rows = run(optimizer, binder, 5, key="weight_decay")
    assert [row[0] for row in rows] == [0.0] * 5
    assert [row[1] for row in rows] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_binder_with_a_factor_can_be_saved_pickled_attached_again_and_given_a_group():
    optimizer = build({"lr_scale": 0.5}, {}, lr=0.1)
    binder = attach("ExponentialLR", optimizer, gamma=0.5)
    run(optimizer, binder, 1)
    assert binder.get_last_lr() == [0.025, 0.05]
    state = binder.state_dict()
    again = attach("ExponentialLR", optimizer, gamma=0.5)
    assert again.get_last_lr() == [0.05, 0.1]
    again.load_state_dict(state)
    assert again.get_last_lr() == [0.025, 0.05]
    copied = pickle.loads(pickle.dumps(again))
    copied.optimizer.add_param_group({"params": weights(), "lr": 0.8, "lr_scale": 0.25})
    copied.step()
    assert copied.get_last_lr() == [0.0125, 0.025, 0.05]


def test_attach_lrs_that_include_the_factor_already_is_rejected():
    optimizer = build({"lr_scale": 0.5, "lr": 0.05}, {"lr_scale": 1.0}, lr=0.1)
    with pytest.raises(ValueError, match=r"`lr_scale`, but the learning rates \(0.05, 0.1\)"):
        attach("StepLR", optimizer, step_size=2)
    assert "initial_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize("name", ["AutoWU", "ReduceLROnPlateau"])
def test_attach_a_feedback_schedule_to_a_group_with_a_factor_is_rejected(name):
    params = {"steps_per_epoch": 5, "total_epochs": 9} if name == "AutoWU" else {}
    optimizer = build({}, {"lr_scale": 0.5}, lr=0.1)
    with pytest.raises(
        ValueError, match="param group 1 sets `lr_scale` to 0.5. Remove the key, and multiply"
    ):
        attach(name, optimizer, **params)


def compute_megatron_lr(step, max_lr, min_lr, warmup=2, end=6):
    """Megatron-LM's cosine decay after a linear warmup from 0."""
    if step <= warmup:
        return max_lr * step / warmup
    ratio = min(1.0, (step - warmup) / (end - warmup))
    return min_lr + (max_lr - min_lr) * 0.5 * (math.cos(math.pi * ratio) + 1.0)


def test_megatrons_schedule_reads_the_bounds_in_the_groups():
    optimizer = build({"max_lr": 0.5}, {"min_lr": 0.01}, {"end_wd": 0.3}, lr=0.2, weight_decay=0.1)
    params = {"lr_warmup_steps": 2, "lr_decay_steps": 6, "lr_decay_style": "cosine"}
    decay = {"end_wd": 0.1, "wd_incr_steps": 6}
    binder = attach("OptimizerParamScheduler", optimizer, max_lr=0.2, **params, **decay)
    for step in range(8):
        bounds = [(0.5, 0.0), (0.2, 0.01), (0.2, 0.0)]
        expected = [compute_megatron_lr(step, *each) for each in bounds]
        assert binder.get_last_lr() == pytest.approx(expected)
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == pytest.approx([end * min(1, step / 6) for end in (0.1, 0.1, 0.3)])
        optimizer.step()
        binder.step()


def test_attach_another_schedule_to_a_group_with_max_lr_is_rejected():
    optimizer = build({}, {"max_lr": 0.5}, lr=0.1)
    with pytest.raises(ValueError, match=r"param group 1 sets `max_lr` to 0.5. Set the learning"):
        attach("OneCycle", optimizer, **CYCLE)


def test_attach_after_torchs_one_cycle_ignores_the_keys_that_it_leaves():
    optimizer = build({}, lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    assert "max_lr" in optimizer.param_groups[0]
    assert attach("StepLR", optimizer, step_size=2, base=0.1).get_last_lr() == [0.1]


@pytest.mark.parametrize(
    ("name", "key", "params"),
    [
        ("OneCycleLR", "max_lr", {"total_steps": 12, "div_factor": 10.0}),
        ("CyclicLR", "max_lr", {"base_lr": [0.01, 0.02], "step_size_up": 3, "mode": "triangular2"}),
    ],
)
def test_a_null_maximum_is_the_lr_of_each_group(name, key, params):
    """PyTorch's class gets the same values as a list."""
    lrs = [0.1, 0.4]
    ours = build(*({"lr": lr} for lr in lrs))
    theirs = build(*({"lr": lr} for lr in lrs))
    binder = attach(name, ours, **{key: None}, **params)
    reference = getattr(torch.optim.lr_scheduler, name)(theirs, **{key: lrs}, **params)
    for _ in range(11):
        assert binder.get_last_lr() == pytest.approx(reference.get_last_lr(), rel=1e-9)
        for each, scheduler in ((ours, binder), (theirs, reference)):
            each.step()
            scheduler.step()


def test_a_null_maximum_of_one_cycle_is_the_lr_of_each_group():
    optimizer = build({"lr": 0.5}, {"lr": 0.3})
    cycle = schedules.OneCycle(
        cycle_min_lr=[0.1, 0.1], cycle_max_lr=None, cycle_first_step_size=2, cycle_momentum=False
    )
    rows = run(optimizer, attach(cycle, optimizer), 5)
    assert [row[0] for row in rows] == pytest.approx([0.1, 0.3, 0.5, 0.3, 0.1])
    assert [row[1] for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.1])

"""The initial hyperparameters: the script's values, a schedule's values, and saved ones."""

import copy

import numpy as np
import pytest
import torch

from schedules import attach
from tests.schedules.test_torch_scheduler import weights

OF_TORCH = torch.optim.lr_scheduler
STAGES = {
    "CosineAnnealingLR": {"T_max": 5},
    "StepLR": {"step_size": 2, "gamma": 0.5},
    "ExponentialLR": {"gamma": 0.5},
    "LinearLR": {"start_factor": 0.5, "total_iters": 3},
    "MultiStepLR": {"milestones": [2]},
    "PolynomialLR": {"total_iters": 5},
}


def sgd(lr=1e-3):
    return torch.optim.SGD(weights(), lr=lr, momentum=0.9)


def run(optimizer, scheduler, steps):
    lrs = []
    for _ in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


@pytest.mark.parametrize("name", STAGES)
def test_second_stage_starts_from_the_lr_that_the_script_set_as_with_torch(name):
    def second_stage(make):
        optimizer = sgd()
        run(optimizer, make(optimizer), 5)
        optimizer.param_groups[0]["lr"] = 1e-5
        return run(optimizer, make(optimizer), 3)

    ours = second_stage(lambda optimizer: attach(name, optimizer, **STAGES[name]))
    theirs = second_stage(lambda optimizer: getattr(OF_TORCH, name)(optimizer, **STAGES[name]))
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("tensor", [False, True])
def test_second_schedule_after_a_schedule_starts_from_the_first_ones_initial_lr(tensor):
    optimizer = torch.optim.Adam(weights(), lr=torch.tensor(0.1) if tensor else 0.1, foreach=False)
    run(optimizer, attach("ExponentialLR", optimizer, gamma=0.7), 3)
    binder = attach("ExponentialLR", optimizer, gamma=0.5)
    assert binder.get_last_lr() == pytest.approx([0.1])
    assert attach("AutoWU", optimizer, steps_per_epoch=5, total_epochs=9).base_lrs == [
        pytest.approx(0.1)
    ]


def test_second_stage_after_a_feedback_schedule_starts_from_the_lr_that_the_script_set():
    optimizer = sgd()
    binder = attach("AutoWU", optimizer, steps_per_epoch=5, total_epochs=9)
    optimizer.step()
    binder.step(1.0)
    assert attach("StepLR", optimizer, step_size=5).base_lrs == [1e-3]
    optimizer.param_groups[0]["lr"] = 1e-5
    assert attach("StepLR", optimizer, step_size=5).base_lrs == [1e-5]


def test_attach_base_replaces_the_values_of_the_param_groups():
    optimizer = torch.optim.SGD([{"params": weights()}, {"params": weights()}], lr=0.1)
    assert attach("StepLR", optimizer, step_size=5, base=0.5).get_last_lr() == [0.5, 0.5]
    assert attach("StepLR", optimizer, step_size=5, base=[0.5, 0.25]).get_last_lr() == [0.5, 0.25]
    assert attach("StepLR", optimizer, step_size=5, base={"lr": 0.125}).base_lrs == [0.125, 0.125]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ([0.1, 0.2], r"`base\['lr'\]` must be .* \(1\), got a list of length 2"),
        ({"LR": 0.1}, "may contain only the keys lr, .* contains 'LR'"),
    ],
)
def test_attach_invalid_base_is_rejected(base, message):
    with pytest.raises(ValueError, match=message):
        attach("StepLR", sgd(), step_size=5, base=base)


def test_attach_to_a_loaded_optimizer_is_an_error_at_the_first_step_that_shows_both_values():
    optimizer = sgd()
    run(optimizer, attach("LinearLR", optimizer, start_factor=1.0, end_factor=0.0), 2)
    loaded = sgd()
    loaded.load_state_dict(optimizer.state_dict())
    loaded.param_groups[0]["lr"] = 1e-5
    binder = attach("LinearLR", loaded)
    loaded.step()
    with pytest.raises(ValueError, match="group 0 has `lr` 1e-05 and `initial_lr` 0.001"):
        binder.step()
    loaded.load_state_dict(optimizer.state_dict())
    assert attach("LinearLR", loaded, base=1e-5, start_factor=1.0).get_last_lr() == [1e-5]


def test_attach_at_a_step_to_a_loaded_optimizer_continues_it():
    params = {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 10}
    optimizer = sgd()
    binder = attach("LinearLR", optimizer, **params)
    run(optimizer, binder, 4)
    loaded = copy.deepcopy(optimizer)
    other = attach("LinearLR", loaded, at=4, **params)
    assert run(loaded, other, 6) == run(optimizer, binder, 6)


def test_attach_at_a_step_with_feedback_is_rejected():
    with pytest.raises(ValueError, match="`at` must be 0, got"):
        attach("ReduceLROnPlateau", sgd(), at=3)


def test_load_state_dict_with_another_base_is_rejected_unless_overridden():
    params = {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 10}
    optimizer = sgd()
    binder = attach("LinearLR", optimizer, **params)
    run(optimizer, binder, 5)
    other = attach("LinearLR", sgd(1e-4), **params)
    with pytest.raises(
        ValueError, match=r"initial `lr` .* \[0.001\] in the saved state but \[0.0001"
    ):
        other.load_state_dict(binder.state_dict())
    assert other.get_last_lr() == [1e-4]
    other.load_state_dict(binder.state_dict(), override=True)
    assert other.get_last_lr() == [5e-5]


def test_load_state_dict_override_extends_the_schedule():
    optimizer = sgd()
    binder = attach("CosineAnnealingLR", optimizer, T_max=10)
    run(optimizer, binder, 5)
    longer = attach("CosineAnnealingLR", sgd(), T_max=20)
    longer.load_state_dict(binder.state_dict(), override=True)
    assert longer.last_epoch == 5
    expected = 1e-3 * (1 + 2**-0.5) / 2
    assert longer.get_last_lr() == pytest.approx([expected])


def test_load_state_dict_of_torchs_class_is_rejected():
    state = OF_TORCH.CosineAnnealingLR(sgd(), 9).state_dict()
    with pytest.raises(ValueError, match="must be from a onecycle schedule, got .*T_max"):
        attach("CosineAnnealingLR", sgd(), T_max=9).load_state_dict(state)


def test_attach_after_the_optimizers_state_is_restored_starts_from_the_initial_lr():
    optimizer = sgd()
    first = attach("ExponentialLR", optimizer, gamma=0.5)
    run(optimizer, first, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        run(optimizer, attach("LinearLR", optimizer), 3)
        optimizer.load_state_dict(saved)
    assert first.get_last_lr() == [2.5e-4]


def test_load_state_dict_override_of_another_feedback_schedule_is_rejected():
    state = attach("ReduceLROnPlateau", sgd()).state_dict()
    other = attach("AutoWU", sgd(), steps_per_epoch=5, total_epochs=9)
    with pytest.raises(
        ValueError, match="state of ReduceLROnPlateau does not contain the past loss"
    ):
        other.load_state_dict(state, override=True)


@pytest.mark.parametrize("start", [0.1, 0.2, 0.3, 1 / 3])
@pytest.mark.parametrize("steps", [3, 5, 7, 11])
def test_attach_after_torchs_warmup_starts_from_the_initial_lr(start, steps):
    optimizer = sgd()
    run(optimizer, OF_TORCH.LinearLR(optimizer, start_factor=start, total_iters=steps), steps)
    binder = attach("ExponentialLR", optimizer, gamma=0.5)
    assert run(optimizer, binder, 2) == pytest.approx([1e-3, 5e-4])


def test_attach_after_the_script_set_the_lr_and_added_a_group_starts_from_these_values():
    optimizer = sgd()
    run(optimizer, attach("ExponentialLR", optimizer, gamma=0.5), 2)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.add_param_group({"params": weights(), "lr": 0.5})
    binder = attach("ExponentialLR", optimizer, gamma=0.5)
    run(optimizer, binder, 1)
    assert binder.get_last_lr() == [0.125, 0.25]


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize("damage", [{"step": 2.5}, {"step": -7}, {"step": "2"}, {"is_written": 1}])
def test_load_state_dict_of_a_damaged_state_is_rejected(damage, override):
    binder = attach("StepLR", sgd(), step_size=5)
    (key,) = damage
    with pytest.raises(ValueError, match=f"`lr_scheduler.{key}` must be"):
        binder.load_state_dict({**binder.state_dict(), **damage}, override=override)
    assert binder.last_epoch == 0


@pytest.mark.parametrize(
    "base", [torch.tensor(0.5), np.float32(0.5), np.array([0.5]), {"lr": torch.tensor([0.5])}]
)
def test_attach_base_can_be_a_tensor_or_a_number_of_numpy(base):
    assert attach("StepLR", sgd(), step_size=5, base=base).base_lrs == [0.5]

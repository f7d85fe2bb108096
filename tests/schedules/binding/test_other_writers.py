"""Values that other code changes between two steps, and param groups that it moves."""

import copy
import pickle
import warnings

import pytest
import torch

import engine
from engine.errors import CheckpointError
from schedules import attach
from schedules.core.saved_state import StateMismatchError
from tests.schedules.binding.test_param_groups import Mixed
from tests.schedules.test_torch_scheduler import AUTOWU, CYCLE, weights

LRS = (0.1, 0.2, 0.4)
LONG = CYCLE | {"cycle_first_step_size": 100}
PER_GROUP = LONG | {"cycle_min_lr": list(LRS), "cycle_max_lr": [1.0, 2.0, 3.0]}


def build_groups(*lrs):
    return [{"params": weights(), "lr": lr} for lr in lrs]


def sgd(*lrs):
    return torch.optim.SGD(build_groups(*lrs or LRS), momentum=0.9)


def sgd_with_equal_lrs():
    return sgd(0.1, 0.1, 0.1)


def adam(*lrs):
    return torch.optim.AdamW(build_groups(*lrs or LRS))


def adam_with_equal_lrs():
    return adam(0.1, 0.1, 0.1)


def adam_with_betas_per_group():
    optimizer = adam()
    for group, beta2 in zip(optimizer.param_groups, (0.99, 0.98, 0.97), strict=True):
        group["betas"] = (0.9, beta2)
    return optimizer


def adam_with_tensors(is_shared=False):
    lrs = [torch.tensor(1.0)] * 3 if is_shared else map(torch.tensor, LRS)
    return torch.optim.Adam(build_groups(*lrs), lr=torch.tensor(1.0), foreach=False)


CASES = {
    "line": (adam_with_equal_lrs, "OneCycle", LONG),
    "lines": (adam, "OneCycle", PER_GROUP),
    "lines, betas per group": (adam_with_betas_per_group, "OneCycle", PER_GROUP),
    "shared": (sgd_with_equal_lrs, "OneCycle", LONG),
    "each": (sgd, "OneCycle", PER_GROUP),
    "short pieces": (sgd, "StepLR", {"step_size": 1, "gamma": 0.9}),
    "tensors": (adam_with_tensors, "CosineAnnealingLR", {"T_max": 100}),
    "feedback": (sgd, "AutoWU", AUTOWU),
    "warmup of a plateau": (sgd, "ReduceLROnPlateau", {"warmup_steps": 50}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def start(case, steps=3):
    """Return a function that takes a step of a schedule, and its optimizer."""
    build, name, params = case
    optimizer = build()
    binder = attach(name, optimizer, **params)
    arguments = [1.0] if name == "AutoWU" else []

    def step():
        optimizer.step()
        binder.step(*arguments)

    for _ in range(steps):
        step()
    return step, optimizer


def assert_silent(step, steps=3):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(steps):
            step()


@every_case
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changed_lr_is_overwritten_with_one_warning(case, changed):
    step, optimizer = start(case)
    peer, same = start(case)
    group = optimizer.param_groups[changed]
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].mul_(0.5)
    else:
        group["lr"] *= 0.5
    value = float(group["lr"])
    with pytest.warns(UserWarning, match="Other code set `lr`") as caught:
        step()
    peer()
    lrs = [[float(each["lr"]) for each in o.param_groups] for o in (optimizer, same)]
    assert lrs[0] == lrs[1]
    text = str(caught[0].message)
    assert f"`lr` of param group {changed} to {value:g}, " in text
    assert f"replaced it with {lrs[0][changed]:g}." in text
    assert caught[0].filename == __file__
    group["lr"] = group["lr"] * 0.5
    assert_silent(step)


@every_case
def test_values_that_are_written_again_do_not_warn(case):
    step, optimizer = start(case)
    for group in optimizer.param_groups:
        group["lr"] = copy.deepcopy(group["lr"]) + 0.0
    assert_silent(step)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32)
    assert_silent(step)


@pytest.mark.parametrize("case", [case for case in CASES.values() if "OneCycle" in case])
def test_changed_momentum_is_overwritten_with_a_warning(case):
    step, optimizer = start(case)
    group = optimizer.param_groups[1]
    if "betas" in group:
        group["betas"] = (0.25, group["betas"][1])
    else:
        group["momentum"] = 0.25
    with pytest.warns(UserWarning, match=r"`(momentum|betas\[0\])` of param group 1 to 0.25, "):
        step()


@pytest.mark.parametrize("shared", [True, False])
def test_long_pieces_stay_on_the_fast_path(shared, monkeypatch):
    for build, name, params in [*list(CASES.values())[:5], CASES["tensors"]]:
        if shared and params is PER_GROUP:
            continue
        binder = attach(name, build() if not shared else adam_with_tensors(shared), **params)
        binder.step()
        slow = []
        monkeypatch.setattr(binder, "_step_slowly", lambda *args, slow=slow: slow.append(args))
        for _ in range(5):
            binder.step()
        assert slow == []


def test_torchs_plateau_beside_a_schedule_warns():
    optimizer = sgd()
    warmup = attach("LinearLR", optimizer, total_iters=2)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(2):
        optimizer.step()
        warmup.step()
        plateau.step(1.0)
    with pytest.warns(UserWarning, match="use only `schedules.ReduceLROnPlateau`"):
        warmup.step()


def test_optimizer_state_loaded_without_the_schedule_warns():
    step, optimizer = start(CASES["line"], steps=1)
    best = copy.deepcopy(optimizer.state_dict())
    for _ in range(5):
        step()
    optimizer.load_state_dict(best)
    with pytest.warns(UserWarning, match=r"`lr` of param group 0 to 0\.104, .* with 0\.128"):
        step()


@pytest.mark.parametrize("is_optimizer_first", [True, False])
def test_state_loaded_in_the_middle_of_a_run_does_not_warn(is_optimizer_first):
    optimizer = adam()
    binder = attach("OneCycle", optimizer, **PER_GROUP)
    optimizer.step()
    binder.step()
    states = [(each, copy.deepcopy(each.state_dict())) for each in (optimizer, binder)]
    for _ in range(4):
        binder.step()
    for each, state in states if is_optimizer_first else reversed(states):
        each.load_state_dict(state)
    assert_silent(binder.step)


def test_values_of_a_copy_or_of_an_assigned_optimizer_do_not_warn():
    optimizer = sgd()
    binder = attach("ExponentialLR", optimizer, gamma=0.5)
    optimizer.step()
    binder.step()
    copied = pickle.loads(pickle.dumps(binder))
    assert_silent(copied.step)
    binder.optimizer = sgd()
    assert_silent(binder.step)
    assert [group["lr"] for group in binder.optimizer.param_groups] == [
        0.1 / 16,
        0.2 / 16,
        0.4 / 16,
    ]


def test_value_at_a_step_that_the_script_set_does_not_warn():
    optimizer = sgd()
    binder = attach("ExponentialLR", optimizer, gamma=0.5)
    optimizer.step()
    binder.step()
    binder.last_epoch = 3
    for group, lr in zip(optimizer.param_groups, LRS, strict=True):
        group["lr"] = lr / 8
    assert_silent(binder.step)


def replace_first(groups):
    del groups[0]
    return groups, {"params": weights(), "lr": 0.3}


def replace_last(groups):
    del groups[-1]
    return groups, {"params": weights(), "lr": 0.3}


def swap(groups):
    return [groups[1], groups[0], *groups[2:]], None


@pytest.mark.parametrize("change", [replace_first, replace_last, swap])
@pytest.mark.parametrize("name", ["ExponentialLR", "AutoWU", "ReduceLROnPlateau"])
def test_param_groups_that_are_replaced_or_reordered_are_an_error(change, name):
    optimizer = sgd()
    params = {"ExponentialLR": {"gamma": 0.5}, "AutoWU": AUTOWU}.get(name, {})
    binder = attach(name, optimizer, **params)
    arguments = [] if name == "ExponentialLR" else [1.0]
    optimizer.step()
    binder.step(*arguments)
    optimizer.param_groups, added = change(optimizer.param_groups)
    if added:
        optimizer.add_param_group(added)
    lrs = [group["lr"] for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="param groups were removed or reordered"):
        binder.step(*arguments)
    with pytest.raises(ValueError, match="param groups were removed or reordered"):
        binder.state_dict()
    assert [group["lr"] for group in optimizer.param_groups] == lrs
    assert binder.last_epoch == 1


def test_reordered_groups_with_different_keys_are_the_same_error():
    optimizer = Mixed()
    momenta = {"cycle_min_mom": [0.8, 0.7], "cycle_max_mom": [0.95, 0.85]}
    bounds = {"cycle_min_lr": [0.1, 0.2], "cycle_max_lr": [0.5, 0.6]}
    binder = attach("OneCycle", optimizer, **CYCLE | bounds | momenta)
    optimizer.step()
    binder.step()
    optimizer.param_groups.reverse()
    with pytest.raises(ValueError, match="param groups were removed or reordered"):
        binder.step()


def test_loaded_or_copied_param_groups_are_the_same_groups():
    optimizer = sgd()
    binder = attach("ExponentialLR", optimizer, gamma=0.5)
    optimizer.step()
    binder.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_silent(binder.step, steps=1)
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    assert_silent(binder.step, steps=1)
    for group in optimizer.param_groups:
        group["params"] = list(group["params"])
    assert_silent(binder.step, steps=1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 / 16, 0.2 / 16, 0.4 / 16]


def test_state_of_another_schedule_or_of_more_groups_is_a_mismatch():
    state = attach("ExponentialLR", sgd(), gamma=0.5).state_dict()
    one = torch.optim.SGD(weights(), lr=0.1)
    with pytest.raises(StateMismatchError, match=r"has 3 param groups, but the optimizer has 1"):
        attach("ExponentialLR", one, gamma=0.5).load_state_dict(state)
    with pytest.raises(StateMismatchError, match="`gamma` is 0.5 in the saved state but 0.9 now"):
        attach("ExponentialLR", sgd(), gamma=0.9).load_state_dict(state)
    damaged = state | {"step": "one"}
    with pytest.raises(ValueError) as error:
        attach("ExponentialLR", sgd(), gamma=0.5).load_state_dict(damaged)
    assert not isinstance(error.value, StateMismatchError)


def test_resume_after_a_group_was_added_reports_a_mismatch_that_can_be_fixed(tmp_path):
    def build(resume):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        checkpoint = {"dir": str(tmp_path), "every": 2, "resume": resume}
        config = {
            "train_batch_size": 4,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "scheduler": {"type": "ExponentialLR", "params": {"gamma": 0.5}},
            "engine": {"checkpoint": checkpoint},
        }
        trainer, optimizer, *_ = engine.initialize(
            config=config, model=model, model_parameters=model[1].parameters()
        )
        return trainer, optimizer, {"params": list(model[0].parameters()), "lr": 0.8}

    trainer, optimizer, added = build("auto")
    optimizer.add_param_group(added)
    for _ in range(2):
        trainer.backward(trainer(torch.ones(4, 2)).mean())
        trainer.step()
    trainer.destroy()
    with pytest.raises(CheckpointError) as error:
        build("auto")
    message = str(error.value)
    assert "global_step2 does not match this run. The saved state has 2 param groups" in message
    assert "damaged" not in message
    assert "add_param_group()" in message
    assert '`engine.checkpoint.resume` to "never", and call load_checkpoint()' in message
    trainer, optimizer, added = build("never")
    optimizer.add_param_group(added)
    trainer.load_checkpoint(tmp_path)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.2]
    trainer.destroy()

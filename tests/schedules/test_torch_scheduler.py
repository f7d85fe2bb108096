"""The binder: values that it writes, values that it keeps, and saving and loading its state."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch

import schedules
from schedules import ScheduleBinder, attach, trace

CYCLE = {
    "cycle_min_lr": 0.1,
    "cycle_max_lr": 0.5,
    "cycle_first_step_size": 3,
    "cycle_min_mom": 0.8,
    "cycle_max_mom": 0.95,
}
AUTOWU = {"total_epochs": 20, "steps_per_epoch": 9}


def weights(count=1):
    return [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]


def without_tensors(optimizer):
    """Return copies of the param groups without the parameters."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def run(optimizer, binder, steps):
    """Run some steps and return the param groups before each step."""
    history = []
    for _ in range(steps):
        history.append(without_tensors(optimizer))
        optimizer.step()
        binder.step()
    return history


def optimizers():
    two = [{"params": weights()}, {"params": weights(), "weight_decay": 0.5}]
    return {
        "SGD": torch.optim.SGD(weights(), lr=0.1, momentum=0.9),
        "AdamW": torch.optim.AdamW(weights(), lr=0.1, betas=(0.9, 0.95)),
        "Adam, fused": torch.optim.Adam(weights(), lr=0.1, fused=True),
        "RMSprop": torch.optim.RMSprop(weights(), lr=0.1),
        "two groups": torch.optim.AdamW(two, lr=0.1),
    }


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("OneCycle", CYCLE),
        ("WarmupLR", {"warmup_num_steps": 2}),
        ("AutoWU", AUTOWU),
        ("ReduceLROnPlateau", {}),
    ],
)
def test_binder_and_optimizer_are_freed_without_the_garbage_collector(name, params):
    torch.optim.SGD(weights(), lr=0.1)  # torch keeps references to the first optimizer
    gc.collect()
    gc.disable()
    try:
        optimizer = torch.optim.SGD(weights(), lr=0.1, momentum=0.9)
        binder = attach(name, optimizer, **params)
        binder.step(*([1.0] if binder.schedule.feedback else []))
        binder.load_state_dict(binder.state_dict())
        references = [weakref.ref(binder), weakref.ref(optimizer)]
        del binder, optimizer
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("name", optimizers())
def test_binder_each_group_has_the_values_of_trace(name):
    optimizer = optimizers()[name]
    history = run(optimizer, attach("OneCycle", optimizer, **CYCLE), 10)
    expected = trace({"type": "OneCycle", "params": CYCLE}, 10)
    for step, groups in enumerate(history):
        for group in groups:
            assert group["lr"] == expected["lr"][step, 0]
            momentum = group["momentum"] if "momentum" in group else group["betas"][0]
            assert momentum == expected["momentum"][step, 0]


def test_binder_keeps_other_betas_and_hyperparameters():
    groups = [
        {"params": weights(), "betas": (0.9, 0.95)},
        {"params": weights(), "betas": (0.9, 0.9999), "weight_decay": 0.5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, eps=1e-6, weight_decay=0.25)
    history = run(optimizer, attach("OneCycle", optimizer, **CYCLE), 10)
    assert {groups[0]["betas"][1] for groups in history} == {0.95}
    assert {groups[1]["betas"][1] for groups in history} == {0.9999}
    assert {tuple(group["weight_decay"] for group in groups) for groups in history} == {(0.25, 0.5)}
    assert {group["eps"] for groups in history for group in groups} == {1e-6}


def test_binder_with_three_betas_keeps_the_last_two():
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    group = optimizer.param_groups[0]
    del group["momentum"]
    group["betas"] = (0.9, 0.92, 0.999)
    binder = attach("OneCycle", optimizer, **CYCLE)
    binder.step()
    assert binder.get_mom() == [group["betas"]]
    assert group["betas"] == (pytest.approx(0.9), 0.92, 0.999)


def test_binder_with_a_list_uses_one_bound_per_group():
    optimizer = torch.optim.SGD([{"params": weights()}, {"params": weights()}], lr=0.1)
    params = CYCLE | {"cycle_max_lr": [0.5, 0.9]}
    history = run(optimizer, attach("OneCycle", optimizer, **params), 5)
    assert [group["lr"] for group in history[3]] == [0.5, 0.9]


def test_binder_with_a_tensor_lr_writes_in_place():
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.Adam(weights(), lr=rate)
    binder = attach("WarmupLR", optimizer, warmup_num_steps=2, warmup_type="linear")
    for expected in (0.0, 0.05, 0.1):
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(expected)
        binder.step()


def test_binder_has_the_methods_of_torch_schedulers():
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    binder = attach("OneCycle", optimizer, **CYCLE)
    assert isinstance(binder, torch.optim.lr_scheduler.LRScheduler)
    assert binder.get_last_lr() == binder.get_lr() == [0.1]
    assert binder.get_mom() == [0.95]
    assert binder.base_lrs == [0.1]
    assert attach("WarmupLR", optimizer).get_mom() is None


@pytest.mark.parametrize("schedule", [("OneCycle", CYCLE, {}), ("AutoWU", AUTOWU, {"loss": 1.0})])
def test_binder_step_before_the_first_optimizer_step_warns_once(schedule):
    name, params, arguments = schedule
    binder = attach(name, torch.optim.SGD(weights(), lr=0.1), **params)
    with pytest.warns(UserWarning, match=r"was called before the first `optimizer\.step"):
        binder.step(**arguments)
    in_order = torch.optim.SGD(weights(), lr=0.1)
    other = attach(name, in_order, **params)
    in_order.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        binder.step(**arguments)
        other.step(**arguments)
    assert not in_order._optimizer_step_post_hooks, "the hook is removed"


@pytest.mark.parametrize(
    "made_first", [True, False], ids=["binder first", "optimizer loaded first"]
)
@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("kill_at", [0, 1, 4, 7])
def test_binder_resumed_in_any_order_gives_the_same_run(made_first, scheduler_first, kill_at):
    def make():
        groups = [{"params": weights(), "lr": 0.2}, {"params": weights(), "lr": 0.04}]
        return torch.optim.SGD(groups, momentum=0.9)

    params = {"total_num_steps": 9, "warmup_num_steps": 3}
    whole = make()
    expected = run(whole, attach("WarmupCosineLR", whole, **params), 9)[kill_at:]
    killed = make()
    binder = attach("WarmupCosineLR", killed, **params)
    run(killed, binder, kill_at)
    states = copy.deepcopy((killed.state_dict(), binder.state_dict()))

    resumed = make()
    if not made_first:
        resumed.load_state_dict(states[0])
    binder = attach("WarmupCosineLR", resumed, **params)
    if scheduler_first:
        binder.load_state_dict(states[1])
    if made_first:
        resumed.load_state_dict(states[0])
    if not scheduler_first:
        binder.load_state_dict(states[1])
    assert binder.get_last_lr() == [group["lr"] for group in expected[0]]
    assert run(resumed, binder, 9 - kill_at) == expected


def test_binder_resumed_without_optimizer_state_writes_immediately():
    params = CYCLE | {"cycle_first_step_size": 10}
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    binder = attach("OneCycle", optimizer, **params)
    run(optimizer, binder, 5)
    fresh = torch.optim.SGD(weights(), lr=0.1)
    attach("OneCycle", fresh, **params).load_state_dict(binder.state_dict())
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.1
    assert fresh.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"]


def test_binder_deepcopy_writes_to_the_copied_optimizer():
    optimizer = torch.optim.AdamW(weights(), lr=0.1)
    binder = attach("OneCycle", optimizer, **CYCLE)
    binder.step()
    before = without_tensors(optimizer)
    copied = copy.deepcopy(binder)
    copied.step()
    assert without_tensors(optimizer) == before
    assert (binder.last_epoch, copied.last_epoch) == (1, 2)
    binder.step()
    assert without_tensors(copied.optimizer) == without_tensors(optimizer)


def test_binder_stored_step_method_uses_a_loaded_state():
    optimizer = torch.optim.AdamW(weights(), lr=0.1)
    binder = attach("OneCycle", optimizer, **CYCLE)
    start = binder.state_dict()
    for _ in range(4):  # until the descent
        binder.step()
    step = binder.step
    step()
    binder.load_state_dict(start)
    step()
    expected = trace({"type": "OneCycle", "params": CYCLE}, 2)
    assert binder.get_last_lr() == [expected["lr"][1, 0]]
    assert binder.get_mom() == [(expected["momentum"][1, 0], 0.999)]


def test_binder_state_of_a_different_schedule_is_rejected():
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    state = attach("OneCycle", optimizer, **CYCLE).state_dict()
    other = attach("OneCycle", optimizer, **(CYCLE | {"cycle_max_lr": 7.0}))
    with pytest.raises(ValueError, match="`cycle_max_lr` is 0.5 in the saved state but 7.0 now"):
        other.load_state_dict(state)
    assert other.get_last_lr() == [0.1]
    with pytest.raises(
        ValueError, match=r"`type` is 'OneCycle' in the saved state but 'WarmupLR' now"
    ):
        attach("WarmupLR", optimizer).load_state_dict(state)


def test_attach_failing_leaves_the_optimizer_unchanged():
    optimizer = torch.optim.Adagrad(weights(), lr=0.2)
    before = without_tensors(optimizer)
    with pytest.raises(ValueError) as error:
        attach("OneCycle", optimizer, **CYCLE)
    message = str(error.value)
    assert "sets `momentum` or `betas`, but param group 0 of Adagrad has" in message
    assert "keys lr, lr_decay, eps" in message
    assert 'Set `"cycle_momentum": false`' in message
    assert without_tensors(optimizer) == before

    optimizer = torch.optim.SGD([{"params": weights()}, {"params": weights()}], lr=0.2)
    before = without_tensors(optimizer)
    with pytest.raises(
        ValueError, match=r"`cycle_max_mom` must be .* \(2\), got a list of length 3"
    ):
        attach("OneCycle", optimizer, **(CYCLE | {"cycle_max_mom": [0.9, 0.9, 0.9]}))
    assert without_tensors(optimizer) == before


def test_binder_group_added_later_starts_from_its_own_lr():
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    binder = attach("ExponentialLR", optimizer, gamma=0.5)
    run(optimizer, binder, 1)
    optimizer.add_param_group({"params": weights(), "lr": 0.8})
    assert binder.get_last_lr() == [0.05, 0.8]
    run(optimizer, binder, 2)
    assert binder.get_last_lr() == [0.0125, 0.1]
    assert binder.base_lrs == [0.1, 0.8]
    restored = attach("ExponentialLR", copy.deepcopy(optimizer), gamma=0.5, base=[0.1, 0.8])
    restored.load_state_dict(binder.state_dict())
    assert restored.get_last_lr() == [0.0125, 0.1]


def test_binder_group_added_to_a_schedule_with_lists_is_an_error_that_changes_nothing():
    groups = [{"params": weights()}, {"params": weights()}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    binder = attach("OneCycle", optimizer, **CYCLE | {"cycle_max_lr": [0.5, 0.9]})
    optimizer.add_param_group({"params": weights()})
    before = without_tensors(optimizer)
    with pytest.raises(ValueError, match=r"Param group 2 was added .* `cycle_max_lr` must be"):
        binder.step()
    assert without_tensors(optimizer) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: attach("OneCycle", o, **CYCLE).step(5), "step() must be called without a loss"),
        (lambda o: attach(schedules.WarmupLR(), o, warmup_num_steps=5), "WarmupLR()"),
        (lambda o: attach("OneCicle", o), "Did you mean `OneCycle`?"),
    ],
)
def test_attach_or_step_invalid_argument_is_rejected(call, message):
    with pytest.raises(ValueError) as error:
        call(torch.optim.SGD(weights(), lr=0.1))
    assert message in str(error.value)


def test_binder_accepts_a_schedule_object():
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    binder = ScheduleBinder(schedules.WarmupLR(warmup_num_steps=2), optimizer)
    assert binder.get_last_lr() == [0.0]


@pytest.mark.parametrize(
    ("type_name", "params", "step", "lrs"),
    [
        ("CosineAnnealingLR", {"T_max": 4, "eta_min": [0.01, 0.02]}, 4, [0.01, 0.02]),
        ("PolyScheduler", {"max_update": 4, "final_lr": [0.01, 0.02]}, 4, [0.01, 0.02]),
        ("FactorScheduler", {"factor": 0.1, "stop_factor_lr": [0.01, 0.02]}, 4, [0.01, 0.02]),
        (
            "OptimizerParamScheduler",
            {"max_lr": [0.1, 0.2], "min_lr": [0.01, 0.02], "lr_decay_steps": 4},
            2,
            [0.055, 0.11],
        ),
    ],
)
def test_attach_list_parameter_applies_per_group(type_name, params, step, lrs):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    binder = schedules.attach(type_name, optimizer, **params)
    for _ in range(step):
        optimizer.step()
        binder.step()
    assert binder.get_last_lr() == pytest.approx(lrs)


def test_attach_list_of_wrong_length_names_the_parameter():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"`eta_min` must be .* \(1\), got a list of length 2"):
        schedules.attach("CosineAnnealingLR", optimizer, T_max=4, eta_min=[0.01, 0.02])


def test_binder_in_sequential_lr_matches_torch():
    of_torch = torch.optim.lr_scheduler

    def lrs(first, second):
        optimizer = torch.optim.SGD(weights(), lr=0.1)
        parts = [first(optimizer), second(optimizer)]
        sequence = of_torch.SequentialLR(optimizer, parts, milestones=[3])
        return [group["lr"] for (group,) in run(optimizer, sequence, 8)]

    ours = lrs(
        lambda optimizer: attach("LinearLR", optimizer, start_factor=0.1, total_iters=4),
        lambda optimizer: attach("StepLR", optimizer, step_size=2, gamma=0.1),
    )
    theirs = lrs(
        lambda optimizer: of_torch.LinearLR(optimizer, start_factor=0.1, total_iters=4),
        lambda optimizer: of_torch.StepLR(optimizer, step_size=2, gamma=0.1),
    )
    assert ours == pytest.approx(theirs)


def test_binder_with_feedback_without_a_loss_rejects_the_step():
    binder = attach("AutoWU", torch.optim.SGD(weights(), lr=0.1), **AUTOWU)
    with pytest.raises(ValueError, match="requires the loss"):
        binder.step()
    assert binder.last_epoch == 0


def test_binder_without_feedback_ignores_a_metric():
    binder = attach("WarmupLR", torch.optim.SGD(weights(), lr=0.1))
    binder.step(metric=1.0)
    assert binder.last_epoch == 1


@pytest.mark.parametrize("type_name, params", [("OneCycle", CYCLE), ("AutoWU", AUTOWU)])
def test_binder_pickled_continues_with_the_same_values(type_name, params):
    optimizer = torch.optim.AdamW(weights(), lr=0.1)
    binder = attach(type_name, optimizer, **params)
    loss = [1.0] if type_name == "AutoWU" else []
    binder.step(*loss)
    copied = pickle.loads(pickle.dumps(binder))
    for _ in range(4):
        binder.step(*loss)
        copied.step(*loss)
    assert without_tensors(copied.optimizer) == without_tensors(optimizer)


def test_binder_after_the_optimizer_loads_other_betas_keeps_them():
    optimizer = torch.optim.AdamW(weights(), lr=0.1, betas=(0.9, 0.95))
    other = torch.optim.AdamW(weights(), lr=0.1, betas=(0.9, 0.9999))
    binder = attach("OneCycle", optimizer, **CYCLE)
    optimizer.load_state_dict(other.state_dict())
    binder.step()
    assert optimizer.param_groups[0]["betas"][1] == 0.9999
    assert binder.get_last_lr() != [0.1]


def test_binder_with_a_tensor_lr_and_curves_per_group_fills_each_tensor():
    rates = [torch.tensor(0.1, dtype=torch.float64) for _ in range(2)]
    groups = [{"params": weights(), "lr": rate} for rate in rates]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    binder = attach("OneCycle", optimizer, **CYCLE | {"cycle_max_lr": [0.5, 0.9]})
    for _ in range(3):
        binder.step()
    assert [group["lr"] is rate for group, rate in zip(groups, rates, strict=True)] == [True, True]
    assert [float(rate) for rate in rates] == [0.5, 0.9]


def test_binder_with_a_metric_is_rejected_by_torchs_sequence_as_torchs_class_is():
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    parts = [attach("WarmupLR", optimizer), attach("ReduceLROnPlateau", optimizer)]
    with pytest.raises(ValueError, match="does not support `ReduceLROnPlateau`"):
        torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


def test_binder_step_after_a_group_was_removed_is_an_error():
    groups = [{"params": weights()} for _ in range(3)]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    bounds = {"cycle_min_lr": [0.1, 0.2, 0.3], "cycle_max_lr": [0.5, 0.6, 0.7]}
    binder = attach("OneCycle", optimizer, **CYCLE | bounds)
    del optimizer.param_groups[0]
    with pytest.raises(ValueError, match="param groups"):
        binder.step()


def test_binder_with_betas_as_a_list_and_curves_per_group_writes_each_group():
    groups = [{"params": weights(), "betas": [0.9, 0.99]} for _ in range(2)]
    bounds = {"cycle_min_lr": [0.1, 0.2], "cycle_max_lr": [0.5, 0.6]}
    optimizer = torch.optim.Adam(groups, lr=0.1)
    binder = attach("OneCycle", optimizer, **CYCLE | bounds)
    binder.step()
    expected = trace({"type": "OneCycle", "params": CYCLE | bounds}, 2, base={"lr": (0.1, 0.1)})
    assert binder.get_last_lr() == expected["lr"][1].tolist()
    assert [group["betas"][1] for group in optimizer.param_groups] == [0.99, 0.99]


def test_binder_repr_shows_the_schedule_the_step_and_the_lr():
    optimizer = torch.optim.SGD([{"params": weights()}, {"params": weights()}], lr=0.1)
    binder = attach("StepLR", optimizer, step_size=2, gamma=0.5)
    run(optimizer, binder, 2)
    assert repr(binder) == "ScheduleBinder(StepLR(step_size=2, gamma=0.5), step=2, lr=[0.05, 0.05])"

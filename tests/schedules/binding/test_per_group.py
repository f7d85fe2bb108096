"""A different schedule in each param group."""

import pickle
import warnings

import numpy as np
import pytest
import torch

import schedules
from schedules import Horizon, attach
from tests.schedules.test_torch_scheduler import weights

LINEAR = {"type": "LinearLR", "params": {"start_factor": 0.0, "total_iters": 4}}
CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 2},
}


def build(*names, lr=0.1):
    groups = [{"params": weights(), **({"name": name} if name else {})} for name in names]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def run(optimizer, binder, steps):
    rows = []
    for _ in range(steps):
        rows.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
        optimizer.step()
        binder.step()
    return rows


def step_all(*binders):
    for binder in binders:
        binder.step()


@pytest.mark.parametrize("mapping", [{"b": CYCLE, "a": LINEAR}, {1: CYCLE, 0: LINEAR}])
def test_attach_a_mapping_gives_each_group_the_values_of_its_schedule(mapping):
    alone = {name: build("x") for name in "ab"}
    a = run(alone["a"], attach(LINEAR, alone["a"]), 6)
    b = run(alone["b"], attach(CYCLE, alone["b"]), 6)
    optimizer = build("a", "b", None)
    rows = run(optimizer, attach(mapping, optimizer), 6)
    assert [row[0] for row in rows] == [row[0] for row in a]
    assert [row[1] for row in rows] == [row[0] for row in b]
    assert [row[2] for row in rows] == [(0.1, 0.9)] * 6


def test_attach_a_mapping_to_groups_of_the_same_name_applies_to_all_of_them():
    optimizer = build("a", "b", "a")
    binder = attach({"a": LINEAR}, optimizer)
    assert binder.get_last_lr() == [0.0, 0.1, 0.0]


def test_yolos_warmup_falls_in_the_bias_group_and_rises_in_the_others():
    """Ultralytics: np.interp(step, [0, nw], [0.1 for biases, else 0.0, lr0])."""
    nw, lr0 = 6, 0.01

    def warmup(start):
        phases = [
            {"from": start, "to": lr0, "duration": nw},
            {"to": 0.0001, "duration": 20},
        ]
        return {"type": "Phases", "params": {"lr": phases}}

    optimizer = build("bias", "weight", lr=lr0)
    binder = attach({"bias": warmup(0.1), "weight": warmup(0.0)}, optimizer)
    rows = np.array(run(optimizer, binder, nw + 21))[:, :, 0]
    steps = np.arange(nw + 1)
    assert rows[: nw + 1, 0] == pytest.approx(np.interp(steps, [0, nw], [0.1, lr0]))
    assert rows[: nw + 1, 1] == pytest.approx(np.interp(steps, [0, nw], [0.0, lr0]))
    assert rows[nw].tolist() == [lr0, lr0]
    assert rows[-1].tolist() == [0.0001, 0.0001]


def test_attach_a_mapping_with_a_scalar_for_groups_with_different_lrs_is_rejected():
    """Groups that share a schedule are checked together, as without a mapping."""
    optimizer = build("a", "b", "c")
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match="`cycle_min_lr` must be a list with one number"):
        attach({"a": CYCLE, "b": CYCLE}, optimizer)
    assert attach({"a": CYCLE, "c": CYCLE}, optimizer).get_last_lr() == [0.1, 0.5, 0.1]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"c": LINEAR}, r"got 'c'. The optimizer has 2 param groups, named 'a', 'b'"),
        ({2: LINEAR}, r"got 2. The optimizer has 2 param groups"),
        ({-1: LINEAR}, r"got -1"),
        ({0: LINEAR, "a": LINEAR}, r"got two keys for param group 0. .*, for example 'a'"),
        ({}, "`schedule` must map at least one param group"),
        ({0: {"type": "ReduceLROnPlateau"}}, "must not depend on the metric"),
        ({0: {"type": "StepLR"}}, "`step_size` is required"),
    ],
)
def test_attach_an_invalid_mapping_is_rejected(mapping, message):
    optimizer = build("a", "b")
    with pytest.raises(ValueError, match=message):
        attach(mapping, optimizer)
    assert "initial_lr" not in optimizer.param_groups[0]


def test_binder_group_added_to_a_mapping_is_an_error_that_names_its_index():
    optimizer = build("a", "b")
    binder = attach({"a": LINEAR, "b": CYCLE}, optimizer)
    optimizer.add_param_group({"params": weights()})
    with pytest.raises(ValueError, match=r"Param group 2 was added .* param groups \(3\), got 2"):
        binder.step()


def test_binder_of_a_mapping_resumes_from_its_state_and_rejects_another_mapping():
    mapping = {"a": {"type": "LinearLR", "params": {"total_iters": "0.5dur"}}, "b": CYCLE}
    horizon = Horizon(total_steps=8)
    first, second = build("a", "b"), build("a", "b")
    binder = attach(mapping, first, horizon=horizon)
    run(first, binder, 3)
    resumed = attach(mapping, second, horizon=horizon)
    resumed.load_state_dict(pickle.loads(pickle.dumps(binder.state_dict())))
    assert run(first, binder, 4) == run(second, resumed, 4)
    other = attach({"a": LINEAR, "b": CYCLE}, build("a", "b"))
    with pytest.raises(ValueError, match="`schedulers` is .* in the saved state"):
        other.load_state_dict(binder.state_dict())


def test_binder_of_a_mapping_can_be_pickled():
    optimizer = build("a", "b")
    binder = attach({"a": LINEAR, "b": CYCLE}, optimizer)
    run(optimizer, binder, 2)
    copied = pickle.loads(pickle.dumps(binder))
    assert run(copied.optimizer, copied, 3) == run(optimizer, binder, 3)


def test_two_schedules_of_the_same_group_are_still_a_warning():
    optimizer = build("a", "b")
    first = attach({"a": LINEAR}, optimizer)
    second = attach({"b": CYCLE}, optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match="Two schedules set lr .* pass a dict to `attach`"):
        step_all(first, second, first, second)


def test_a_mapping_is_a_single_schedule_without_a_warning():
    optimizer = build("a", "b")
    binder = attach({"a": schedules.StepLR(step_size=2), "b": CYCLE}, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, binder, 6)

"""Functions and PyTorch schedulers as schedules: groups, hyperparameters, state and pickling."""

import io
import json
import pickle

import pytest
import torch

from schedules import attach, from_config
from tests.schedules.test_torch_scheduler import run, weights

OF_TORCH = torch.optim.lr_scheduler


def halve(step):
    return 0.5**step


def decay_in_stairs(step, gamma, stairs=(1,), *, lengths=[2, 4]):  # noqa: B006  # a list, as users write
    """Multiply by gamma at each of the steps."""
    return gamma ** sum(step >= each for each in [*stairs, *lengths])


def decay_by_table(step, table):
    return table[str(int(step))]


def build_decay(optimizer, gamma, last_epoch=-1):
    """Build a scheduler for an optimizer, as the factories of transformers do."""
    return OF_TORCH.LambdaLR(optimizer, lambda step: gamma**step, last_epoch)


def two_groups():
    groups = [{"params": weights(), "lr": 0.1}, {"params": weights(), "lr": 0.05}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("LambdaLR", {"lr_lambda": [halve, lambda step: float(step >= 2)]}),
        ("MultiplicativeLR", {"lr_lambda": [lambda step: 1.0, lambda step: 0.9]}),
        ("CyclicLR", {"base_lr": [0.01, 0.001], "max_lr": [0.1, 0.01], "step_size_up": 3}),
        ("OneCycleLR", {"max_lr": [0.1, 0.2], "total_steps": 10}),
        ("MultiStepLR", {"milestones": [1, 2, 4]}),
    ],
)
def test_wrapped_class_with_lists_sets_what_the_class_itself_sets(name, params):
    ours, theirs = two_groups(), two_groups()
    binder = attach(f"torch.optim.lr_scheduler:{name}", ours, **params)
    peer = getattr(OF_TORCH, name)(theirs, **params)
    for group, other in zip(run(ours, binder, 6), run(theirs, peer, 6), strict=True):
        for key in ("lr", "momentum"):
            assert [g[key] for g in group] == pytest.approx([g[key] for g in other])


def test_wrapped_class_without_momentum_leaves_the_momentum():
    optimizer = torch.optim.Adagrad(weights(), lr=0.1)
    assert attach(OF_TORCH.StepLR, optimizer, step_size=2).get_mom() is None


def test_state_with_functions_can_be_saved_and_loaded():
    def make():
        optimizer = torch.optim.AdamW(weights(), lr=1.0)
        return optimizer, attach("LambdaLR", optimizer, lr_lambda=lambda step: 0.5**step)

    optimizer, binder = make()
    run(optimizer, binder, 3)
    torch.save(binder.state_dict(), io.BytesIO())
    state = json.loads(json.dumps(binder.state_dict()))
    _, other = make()
    other.load_state_dict(state)
    assert other.get_last_lr() == [0.125]
    different = attach("LambdaLR", torch.optim.AdamW(weights(), lr=1.0), lr_lambda=halve)
    with pytest.raises(ValueError, match=r"`lr_lambda` is .*<lambda>' in the .*:halve' now"):
        different.load_state_dict(state)


@pytest.mark.parametrize(
    ("schedule", "params"),
    [
        ("LambdaLR", {"lr_lambda": halve}),
        (halve, {}),
        (f"{__name__}:halve", {}),
        (build_decay, {"gamma": 0.5}),
        (f"{__name__}:build_decay", {"gamma": 0.5}),
        (OF_TORCH.ExponentialLR, {"gamma": 0.5, "last_epoch": -1}),
    ],
)
@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_attach_code_halves_the_lr_also_after_pickling(schedule, params, save):
    optimizer = torch.optim.SGD(weights(), lr=1.0)
    binder = attach(schedule, optimizer, **params)
    run(optimizer, binder, 2)
    if save == "pickle":
        copied = pickle.loads(pickle.dumps(binder))
    else:
        file = io.BytesIO()
        torch.save(binder, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    copied.optimizer.step()
    copied.step()
    assert (binder.get_last_lr(), copied.get_last_lr()) == ([0.25], [0.125])
    assert copied.identity == binder.identity


@pytest.mark.parametrize(
    ("schedule", "params", "message"),
    [
        (build_decay, {}, "`gamma` is required"),
        (halve, {"gamma": 1}, "Unknown parameter `gamma`"),
        ("StepLR", {"step_size": 2, "last_epoch": 4}, "`last_epoch` must be -1 or absent"),
        (torch.nn.Linear, {}, "must be the import path of a scheduler class"),
    ],
)
def test_attach_code_with_invalid_arguments_is_rejected(schedule, params, message):
    with pytest.raises(ValueError, match=message):
        attach(schedule, torch.optim.SGD(weights(), lr=1.0), **params)


def test_function_with_params_receives_them_by_name():
    optimizer = torch.optim.SGD(weights(), lr=1.0)
    block = {"type": f"{__name__}:decay_in_stairs", "params": {"gamma": 0.5, "stairs": [0, 3]}}
    binder = attach(block, optimizer)
    lrs = [groups[0]["lr"] for groups in run(optimizer, binder, 5)]
    assert lrs == [0.5, 0.5, 0.25, 0.125, 0.0625]  # half at steps 0, 2, 3 and 4
    copied = pickle.loads(pickle.dumps(binder))
    assert copied.identity == binder.identity
    assert copied.identity["params"] == {"gamma": 0.5, "stairs": [0, 3]}
    other = attach(decay_in_stairs, torch.optim.SGD(weights(), lr=1.0), gamma=0.1, stairs=[0, 3])
    with pytest.raises(ValueError, match=r"`gamma` is 0.5 in the saved state but 0.1 now"):
        other.load_state_dict(binder.state_dict())


def test_function_with_an_object_as_param_is_accepted():
    table = {"0": 1.0, "1": 0.25}
    binder = attach(decay_by_table, torch.optim.SGD(weights(), lr=2.0), table=table)
    assert [binder.schedule(step, lr=2.0) for step in (0, 1)] == [2.0, 0.5]


def test_function_in_c_is_a_factor_of_the_step():
    assert from_config({"type": "math:sqrt"})(4, lr=0.5) == 1.0


def test_transformers_factory_sets_what_its_scheduler_sets():
    transformers = pytest.importorskip("transformers")
    params = {"num_warmup_steps": 2, "num_training_steps": 6}
    block = {"type": "transformers:get_linear_schedule_with_warmup", "params": params}
    ours, theirs = two_groups(), two_groups()
    peer = transformers.get_linear_schedule_with_warmup(theirs, **params)
    for group, other in zip(run(ours, attach(block, ours), 8), run(theirs, peer, 8), strict=True):
        assert [g["lr"] for g in group] == [g["lr"] for g in other]


class StepDecay(OF_TORCH.LRScheduler):
    def __init__(self, optimizer, factor=0.5, *args, **settings):
        self.factor = factor
        super().__init__(optimizer)

    def get_lr(self):
        return [lr * self.factor**self.last_epoch for lr in self.base_lrs]


def test_scheduler_with_variable_arguments_does_not_require_them():
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    history = run(optimizer, attach(StepDecay, optimizer, factor=0.1), 3)
    lrs = [group["lr"] for [group] in history]
    assert lrs == pytest.approx([0.1, 0.01, 0.001])

"""Schedules composed of other schedules, and wrapped PyTorch scheduler classes."""

import pytest
import torch

import schedules
from schedules import Horizon, ScheduleError, from_config, trace

CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 2},
}
WARMUP = {"type": "LinearLR", "params": {"start_factor": 0.5, "total_iters": 2}}
DECAY = {"type": "Phases", "params": {"weight_decay": [{"from": 0, "to": 0.4, "duration": "4ba"}]}}


def build_block(type_name, *blocks, **params):
    return {"type": type_name, "params": {"schedulers": list(blocks), **params}}


def test_sequential_unset_hyperparameter_keeps_the_groups_value():
    block = build_block("SequentialLR", WARMUP, CYCLE, milestones=[2])
    base = {"lr": (0.2,), "momentum": (0.7,)}
    values = trace(block, 5, base=base)
    assert values["lr"][:, 0] == pytest.approx([0.1, 0.15, 0.1, 0.3, 0.5])
    assert values["momentum"][:, 0] == pytest.approx([0.7, 0.7, 0.9, 0.85, 0.8])


def test_combined_sets_lr_momentum_and_weight_decay():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.2)
    scheduler = schedules.attach(build_block("Combined", CYCLE, DECAY), optimizer)
    values_per_step = []
    for _ in range(5):
        (group,) = optimizer.param_groups
        values_per_step.append((group["lr"], group["betas"], group["weight_decay"]))
        optimizer.step()
        scheduler.step()
    lrs, betas, decays = zip(*values_per_step, strict=True)
    assert lrs == pytest.approx([0.1, 0.3, 0.5, 0.3, 0.1])
    assert [first for first, _ in betas] == pytest.approx([0.9, 0.85, 0.8, 0.85, 0.9])
    assert decays == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_sequential_durations_are_resolved_and_scaled():
    cosine = {"type": "CosineAnnealingLR", "params": {"T_max": "0.5dur"}}
    block = build_block("SequentialLR", WARMUP, cosine, milestones=["0.5dur"])
    resolved = from_config(block, horizon=Horizon(total_steps=40, scale_ratio=2.0))
    assert resolved.milestones == (40,)
    assert resolved.parts[1].T_max == 40


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (build_block("Combined", CYCLE, WARMUP), "0 and 1 both set lr"),
        (build_block("SequentialLR", CYCLE, WARMUP, milestones=[2, 4]), "one fewer than"),
        (
            build_block("SequentialLR", CYCLE, WARMUP, CYCLE, milestones=[4, 2]),
            r"`milestones`.*got \[4, 2\]",
        ),
        (build_block("ChainedScheduler", {"type": "LinearL"}), r"\[0\].*Did you mean `LinearLR`"),
        (build_block("ChainedScheduler", {"typ": "LinearLR"}), r"\[0\]` must be an object"),
        (
            build_block("ChainedScheduler", WARMUP, {"type": "StepLR"}),
            r"\[1\].*`step_size` is required",
        ),
        (build_block("ChainedScheduler"), "must be a list"),
    ],
)
def test_composite_invalid_schedules_are_rejected_with_their_index(block, message):
    with pytest.raises(ScheduleError, match=message):
        from_config(block)


class Halving(torch.optim.lr_scheduler.LRScheduler):
    """A custom PyTorch scheduler."""

    def __init__(self, optimizer, every, last_epoch=-1):
        self.every = every
        super().__init__(optimizer, last_epoch)

    def get_lr(self):
        return [base * 0.5 ** (self.last_epoch // self.every) for base in self.base_lrs]


def class_block(name, **params):
    return {"type": name, "params": params}


def test_wrapped_class_can_be_previewed_attached_and_resumed():
    block = class_block(f"{__name__}:Halving", every=2)
    assert trace(block, 6, base={"lr": (0.4, 0.8)})["lr"].tolist() == [
        [0.4, 0.8], [0.4, 0.8], [0.2, 0.4], [0.2, 0.4], [0.1, 0.2], [0.1, 0.2]
    ]  # fmt: skip
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.4) for _ in range(2)]
    first, second = (schedules.attach(block, optimizer) for optimizer in optimizers)
    for _ in range(4):
        optimizers[0].step()
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == first.get_last_lr() == [0.1]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (class_block("LambdaLR", lr_lambda="math:nothing"), "'math:nothing' cannot be imported"),
        (class_block("LambdaLR"), "`lr_lambda`"),
        (class_block("LambdaLR", lr_lambda=3), "parameters of LambdaLR are invalid"),
        (class_block("LambdaLR", lr_lamda="math:exp"), "Did you mean `lr_lambda`"),
        (class_block("torch.optim.lr_scheduler:ReduceLROnPlateau"), "argument `metrics`"),
        (class_block("LRScheduler"), "must be the name of a schedule"),
    ],
)
def test_wrapped_class_invalid_block_raises_a_specific_error(block, message):
    with pytest.raises(ValueError, match=message):
        from_config(block)


def test_wrapped_class_with_scale_ratio_is_an_error():
    block = class_block("LambdaLR", lr_lambda="math:exp")
    with pytest.raises(ScheduleError, match="`engine.scale_schedule_ratio` must be 1 with"):
        from_config(block, horizon=Horizon(total_steps=10, scale_ratio=2.0))


@pytest.mark.parametrize("type_name", ["ReduceLROnPlateau", "AutoWU"])
def test_composite_feedback_schedule_is_rejected(type_name):
    with pytest.raises(ScheduleError, match=rf"`schedulers\[0\]`.* got {type_name}"):
        from_config(build_block("ChainedScheduler", {"type": type_name, "params": {}}))


def test_phases_exponential_start_at_zero_is_an_error():
    up = {"shape": "exponential", "to": 0.1, "duration": 5}
    phases = {"type": "Phases", "params": {"lr": [{"to": 0, "duration": 5}, up]}}
    with pytest.raises(ScheduleError, match=r"`lr\[1\]` must not start or end at 0"):
        from_config(phases)
    weight_decay = from_config({"type": "Phases", "params": {"weight_decay": [up]}})
    with pytest.raises(ValueError, match="must not start or end at 0, but one goes from 0 to 0.1"):
        weight_decay.curves({"lr": (0.1,), "momentum": (0.9,), "weight_decay": (0.0,)})


def test_phases_relative_momentum_above_one_is_an_error():
    params = {"relative": True, "momentum": [{"to": 2, "duration": 5}]}
    schedule = from_config({"type": "Phases", "params": params})
    with pytest.raises(ValueError, match="`momentum` must be less than 1, but .* 0.9 to 1.8"):
        schedule.curves({"lr": (0.1,), "momentum": (0.9,), "weight_decay": (0.0,)})


@pytest.mark.parametrize("text", ["def f(:", "raise RuntimeError('no')"])
def test_type_in_a_module_that_fails_to_import_is_an_error(tmp_path, monkeypatch, text):
    (tmp_path / "failing_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'failing_module:f' .* with (SyntaxError|RuntimeError)"):
        from_config({"type": "failing_module:f"})


def test_sequential_from_previous_starts_each_schedule_where_the_last_one_ended():
    """Without it, the second and the third schedule start at the initial lr, as in PyTorch."""
    halve = {"type": "LinearLR", "params": {"start_factor": 1, "end_factor": 0.5, "total_iters": 2}}
    thaw = {"type": "Phases", "params": {"momentum": [{"to": 0.5, "duration": 2}]}}
    decay = {"type": "ExponentialLR", "params": {"gamma": 0.1}}
    block = build_block("SequentialLR", halve, thaw, decay, milestones=["2ba", 4])
    base = {"lr": [0.8, 0.4], "momentum": [0.9, 0.9]}
    torch_like = trace(block, 6, base=base)
    assert torch_like["lr"][:, 0] == pytest.approx([0.8, 0.6, 0.8, 0.8, 0.8, 0.08])
    block["params"]["from_previous"] = True
    values = trace(block, 6, base=base)
    assert values["lr"][:, 0] == pytest.approx([0.8, 0.6, 0.4, 0.4, 0.4, 0.04])
    assert values["lr"][:, 1] == pytest.approx([0.4, 0.3, 0.2, 0.2, 0.2, 0.02])
    assert values["momentum"][:, 0] == pytest.approx([0.9, 0.9, 0.9, 0.7, 0.5, 0.5])


def test_sequential_from_previous_does_not_evaluate_steps_outside_of_a_schedule():
    """The last schedule has no end, and its square root has no value at a negative step."""
    root = {"type": "math:sqrt"}
    block = build_block("SequentialLR", root, root, milestones=[4], from_previous=True)
    lrs = trace(block, 9, base={"lr": 1.0})["lr"][:, 0]
    assert lrs == pytest.approx([*(k**0.5 for k in range(4)), *(2 * k**0.5 for k in range(5))])


def test_sequential_from_previous_is_stretched_by_the_scale_ratio():
    decay = {"type": "ExponentialLR", "params": {"gamma": 0.5}}
    block = build_block("SequentialLR", decay, decay, milestones=[4], from_previous=True)
    horizon = Horizon(total_steps=8, scale_ratio=2.0)
    lrs = trace(block, 17, base={"lr": 1.0}, horizon=horizon)["lr"][:, 0]
    assert lrs == pytest.approx([0.5 ** (step / 2) for step in range(17)])


def test_sequential_with_a_plateau_names_its_warmup():
    block = build_block("SequentialLR", WARMUP, {"type": "ReduceLROnPlateau"}, milestones=[2])
    with pytest.raises(ScheduleError, match=r"schedule and set its `warmup_steps` for a warmup\."):
        from_config(block)

"""Schedules of schedules, and scheduler classes that are wrapped."""

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


def of_parts(type_name, *blocks, **params):
    return {"type": type_name, "params": {"schedulers": list(blocks), **params}}


def test_what_a_part_does_not_drive_keeps_the_groups_own_value():
    block = of_parts("SequentialLR", WARMUP, CYCLE, milestones=[2])
    base = {"lr": (0.2,), "momentum": (0.7,)}
    values = trace(block, 5, base=base)
    assert values["lr"][:, 0] == pytest.approx([0.1, 0.15, 0.1, 0.3, 0.5])
    assert values["momentum"][:, 0] == pytest.approx([0.7, 0.7, 0.9, 0.85, 0.8])


def test_a_weight_decay_beside_any_learning_rate():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.2)
    binder = schedules.attach(of_parts("Combined", CYCLE, DECAY), optimizer)
    written = []
    for _ in range(5):
        (group,) = optimizer.param_groups
        written.append((group["lr"], group["betas"], group["weight_decay"]))
        optimizer.step()
        binder.step()
    lrs, betas, decays = zip(*written, strict=True)
    assert lrs == pytest.approx([0.1, 0.3, 0.5, 0.3, 0.1])
    assert [first for first, _ in betas] == pytest.approx([0.9, 0.85, 0.8, 0.85, 0.9])
    assert decays == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_the_durations_of_parts_are_resolved_and_scaled_against_the_run():
    cosine = {"type": "CosineAnnealingLR", "params": {"T_max": "0.5dur"}}
    block = of_parts("SequentialLR", WARMUP, cosine, milestones=["0.5dur"])
    resolved = from_config(block, horizon=Horizon(total_steps=40, scale_ratio=2.0))
    assert resolved.milestones == (40,)
    assert resolved.parts[1].T_max == 40


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (of_parts("Combined", CYCLE, WARMUP), "0 and 1 both drive lr"),
        (of_parts("SequentialLR", CYCLE, WARMUP, milestones=[2, 4]), "one fewer than the 2"),
        (of_parts("SequentialLR", CYCLE, WARMUP, CYCLE, milestones=[4, 2]), "must ascend"),
        (of_parts("ChainedScheduler", {"type": "LinearL"}), r"\[0\].*Did you mean `LinearLR`"),
        (of_parts("ChainedScheduler", {"typ": "LinearLR"}), "must be a list"),
        (
            of_parts("ChainedScheduler", WARMUP, {"type": "StepLR"}),
            r"\[1\].*`step_size` is required",
        ),
        (of_parts("ChainedScheduler"), "must be a list"),
    ],
)
def test_wrong_parts_are_refused_with_their_place(block, message):
    with pytest.raises(ScheduleError, match=message):
        from_config(block)


class Halving(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler of one's own, in PyTorch's manner."""

    def __init__(self, optimizer, every, last_epoch=-1):
        self.every = every
        super().__init__(optimizer, last_epoch)

    def get_lr(self):
        return [base * 0.5 ** (self.last_epoch // self.every) for base in self.base_lrs]


def wrapped(name, **params):
    return {"type": name, "params": params}


def test_a_wrapped_class_runs_previews_and_resumes():
    block = wrapped(f"{__name__}:Halving", every=2)
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
        (wrapped("LambdaLR", lr_lambda="math:nothing"), "'math:nothing' cannot be imported"),
        (wrapped("LambdaLR"), "`lr_lambda` is required."),
        (wrapped("LambdaLR", lr_lambda=3), "LambdaLR refuses its parameters"),
        (wrapped("LambdaLR", lr_lamda="math:exp"), "Did you mean `lr_lambda`"),
        (wrapped("torch.optim.lr_scheduler:ReduceLROnPlateau"), "needs `metrics` at each step"),
        (wrapped("LRScheduler"), "must name a known schedule"),
    ],
)
def test_what_cannot_be_wrapped_says_why(block, message):
    with pytest.raises(ValueError, match=message):
        from_config(block)


def test_a_wrapped_class_cannot_be_scaled():
    block = wrapped("LambdaLR", lr_lambda="math:exp")
    with pytest.raises(ScheduleError, match="`engine.scale_schedule_ratio` must be 1 with"):
        from_config(block, horizon=Horizon(total_steps=10, scale_ratio=2.0))


@pytest.mark.parametrize("type_name", ["ReduceLROnPlateau", "AutoWU"])
def test_what_listens_is_no_part(type_name):
    with pytest.raises(ScheduleError, match=f"but {type_name} listens to"):
        from_config(of_parts("ChainedScheduler", {"type": type_name, "params": {}}))


def test_an_exponential_phase_touches_no_zero_wherever_it_comes_from():
    up = {"shape": "exponential", "to": 0.1, "duration": 5}
    phases = {"type": "Phases", "params": {"lr": [{"to": 0, "duration": 5}, up]}}
    with pytest.raises(ScheduleError, match=r"`lr\[1\]` is exponential and must not touch 0"):
        from_config(phases)
    of_decay = from_config({"type": "Phases", "params": {"weight_decay": [up]}})
    with pytest.raises(ValueError, match="must not touch 0, but goes from 0 to 0.1"):
        of_decay.curves({"lr": (0.1,), "momentum": (0.9,), "weight_decay": (0.0,)})


def test_a_relative_phase_of_momentum_stays_below_one():
    params = {"relative": True, "momentum": [{"to": 2, "duration": 5}]}
    schedule = from_config({"type": "Phases", "params": params})
    with pytest.raises(ValueError, match="must stay below 1, but goes from 0.9 to 1.8"):
        schedule.curves({"lr": (0.1,), "momentum": (0.9,), "weight_decay": (0.0,)})


@pytest.mark.parametrize("text", ["def f(:", "raise RuntimeError('no')"])
def test_a_module_that_fails_is_a_wrong_type_and_no_crash(tmp_path, monkeypatch, text):
    (tmp_path / "failing_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'failing_module:f' .* with (SyntaxError|RuntimeError)"):
        from_config({"type": "failing_module:f"})

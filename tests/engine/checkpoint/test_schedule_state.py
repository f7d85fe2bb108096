"""The position of a schedule after a resume with a scheduler of PyTorch."""

from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

import engine
import schedules
from engine.checkpoint.deepspeed_files import convert_run_state
from engine.checkpoint.schedule_state import convert_deepspeed_state, prepare_schedule_state
from engine.errors import CheckpointError


def start(scheduler, lr=0.1, **checkpoint):
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "SGD", "params": {"lr": lr}},
        "engine": {"backend": "torch", "checkpoint": checkpoint},
    }
    model = torch.nn.Linear(2, 1)
    return engine.initialize(model=model, config=config, lr_scheduler=scheduler)[0]


def train(trainer, steps):
    for _ in range(steps):
        trainer.backward(trainer(torch.ones(2, 2)).mean())
        trainer.step()


def halve_every_second_step(optimizer):
    return StepLR(optimizer, step_size=2, gamma=0.5)


def test_override_keeps_the_position_and_the_settings_of_a_torch_scheduler(tmp_path):
    saved = start(lambda optimizer: LambdaLR(optimizer, lambda step: 1.0))
    train(saved, 5)
    saved.save_checkpoint(tmp_path)
    resumed = start(halve_every_second_step, lr=0.8, override=True)
    resumed.load_checkpoint(tmp_path)
    assert resumed.get_lr() == [pytest.approx(0.2)]
    train(resumed, 1)
    assert resumed.get_lr() == [pytest.approx(0.1)]


def test_override_restarts_a_scheduler_whose_position_is_unknown(tmp_path, caplog):
    saved = start(None)
    train(saved, 2)
    saved.save_checkpoint(tmp_path)
    resumed = start(ReduceLROnPlateau, override=True)
    resumed.load_checkpoint(tmp_path)
    assert "ReduceLROnPlateau restarts from step 0, because its step" in caplog.text
    assert resumed.global_steps == 2


def test_deepspeed_state_of_another_scheduler_is_rejected():
    scheduler = halve_every_second_step(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    assert convert_deepspeed_state(Path("x"), scheduler.state_dict(), scheduler)
    for saved, problem in [
        (None, "x does not contain the state of a scheduler"),
        ({"last_batch_iteration": 3}, "x contains the state of a scheduler that is not a `StepLR`"),
    ]:
        with pytest.raises(CheckpointError, match=f"{problem}.*_states=False"):
            convert_deepspeed_state(Path("x"), saved, scheduler)


def attach(name, **params):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    return schedules.attach(name, optimizer, **params)


def test_deepspeed_state_of_a_different_built_in_schedule_is_not_used():
    saved = attach("ReduceLROnPlateau", patience=3).state_dict()
    same, other = (attach("ReduceLROnPlateau", patience=patience) for patience in (3, 4))
    assert convert_deepspeed_state(Path("x"), saved, same) == saved
    assert convert_deepspeed_state(Path("x"), saved, other) is None


def test_feedback_state_in_a_deepspeed_file_is_complete_and_other_schedules_save_the_step():
    feedback = attach("ReduceLROnPlateau")
    plain = attach("WarmupLR", warmup_min_lr=0.0, warmup_max_lr=0.1)
    for scheduler, saved in [
        (feedback, feedback.state_dict()),
        (plain, {"last_batch_iteration": -1}),  # of DeepSpeed's schedulers before the first step
    ]:
        state = {"lr_scheduler": scheduler.state_dict(), "client_state": {}}
        assert convert_run_state(state) == {"lr_scheduler": saved}


class Adaptive(LambdaLR):
    """A custom scheduler whose values change their type and length."""

    def __init__(self, optimizer):
        self.history, self.best = [], None
        super().__init__(optimizer, lambda step: 1.0)

    def step(self):
        super().step()
        self.history.append(self.last_epoch)
        self.best = {"step": self.last_epoch}


def test_custom_scheduler_returns_to_a_state_with_fewer_values(tmp_path):
    trainer = start(Adaptive)
    scheduler = trainer.lr_scheduler
    scheduler.history, scheduler.best = [], None
    trainer.save_checkpoint(tmp_path)
    train(trainer, 2)
    trainer.load_checkpoint(tmp_path)
    assert (scheduler.history, scheduler.best, scheduler.last_epoch) == ([], None, 0)


def test_state_without_a_key_of_the_custom_scheduler_is_damaged():
    trainer = start(Adaptive)
    scheduler, config = trainer.lr_scheduler, trainer._run.config
    saved = scheduler.state_dict()
    del saved["history"]
    with pytest.raises(ValueError, match="`lr_scheduler` must have the key 'history'"):
        prepare_schedule_state(scheduler, {"lr_scheduler": saved}, config, 0, override=False)

"""A user's script that a type checker must accept; `test_typing` also runs it."""

from typing import assert_type

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset

import engine
import onecycle
import schedules


def optimizer() -> Optimizer:
    return SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)


def construct_with_time_strings_and_lists() -> None:
    schedules.OneCycle(cycle_min_lr=[0.1, 0.2], cycle_max_lr=(0.5, 1), cycle_first_step_size="9ep")
    schedules.CosineAnnealingLR(T_max="1dur", eta_min=[0.0, 0.01])
    schedules.MultiStepLR(milestones=["3ep", 60, "0.8dur"])
    schedules.OptimizerParamScheduler(max_lr=1, lr_decay_steps=100, start_wd=[0, 0.1], end_wd=0.1)
    schedules.Phases(lr=[{"from": 0, "to": 0.1, "duration": "0.5dur"}])


def resolve(horizon: schedules.Horizon) -> None:
    warmup = schedules.WarmupLR(warmup_num_steps="2ep").resolve(horizon)
    assert_type(warmup, schedules.WarmupLR)
    assert_type(warmup.warmup_num_steps, int | str)


def attach_with_feedback(loss: Tensor) -> None:
    scheduler = schedules.attach("AutoWU", optimizer(), steps_per_epoch=10, total_epochs=10)
    assert_type(scheduler, schedules.ScheduleBinder)
    scheduler.step(loss=loss)
    scheduler.step(loss=0.5)
    if scheduler.decision is not None:
        assert_type(scheduler.decision.lr, float)


def attach_with_metric(metric: float) -> None:
    scheduler = schedules.attach(schedules.ReduceLROnPlateau(patience=2), optimizer())
    scheduler.step(metric=metric)


def train(dataset: Dataset[tuple[Tensor, Tensor]]) -> None:
    trainer, own, loader, scheduler = engine.initialize(
        config={"train_batch_size": 8}, model=nn.Linear(2, 2), training_data=dataset
    )
    assert_type(trainer, engine.Engine)
    assert_type(own, Optimizer)
    for x, y in loader:
        trainer.backward(nn.functional.mse_loss(trainer(x), y))
        assert_type(bool(trainer.step()), bool)
    scheduler.get_last_lr()
    batches = DataLoader(dataset, batch_size=8)
    assert_type(trainer.prepare(batches), DataLoader[tuple[Tensor, Tensor]])
    assert_type(engine.lr_range_test(trainer, batches), engine.LRRangeReport)
    assert_type(trainer.evaluate(batches, lambda batch: torch.ones(())), float)
    assert_type(trainer.evaluate(batches, lambda batch: (0.5, len(batch))), float)
    assert_type(trainer.evaluate(batches, lambda batch: {"loss": 0.5}), dict[str, float])
    metrics = {"loss": torch.ones(()), "accuracy": 0.5}
    assert_type(trainer.evaluate(batches, lambda batch: (metrics, 3)), dict[str, float])
    engine.initialize(config={}, model=nn.Linear(2, 2), training_data=batches)


def handle_errors(path: str) -> list[engine.Problem]:
    try:
        assert_type(engine.load_config(path), engine.Config)
    except (engine.ConfigError, engine.CheckpointError, engine.MisuseError):
        return engine.validate(path)
    return []


def use_the_facade(dataset: Dataset[tuple[Tensor, Tensor]]) -> onecycle.Engine:
    trainer, *_ = onecycle.initialize(
        config={"train_batch_size": 8}, model=nn.Linear(2, 2), training_data=dataset
    )
    assert_type(trainer, engine.Engine)
    assert_type(onecycle.__version__, str)
    assert_type(onecycle.schedules.Horizon(), schedules.Horizon)
    return trainer

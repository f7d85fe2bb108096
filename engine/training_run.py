"""One run of training: its state, which a trial run replaces as a whole, and its steps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from engine.backends.base import Backend
from engine.checkpoint.rng import load_random_state, random_state
from engine.checkpoint.rollback import Rollback
from engine.config import Config
from engine.training.data import RunLoader
from engine.training.loss_window import LossWindow
from engine.training.monitors import Monitor
from engine.training.progress import Counters, ProgressReporter, StepRecord, StepRecorder
from engine.training.schedule_driver import ScheduleDriver
from schedules import AutoWU, Schedule
from schedules.param_groups import momenta_of
from schedules.torch_scheduler import bind

__all__ = ["TrainingRun", "preserve"]

log = logging.getLogger("onecycle")


@dataclass
class TrainingRun:
    """A run of training on a backend, from its first step to its last.

    The LR range test replaces the engine's run by another one, and puts the first one back. Not
    part of `Engine`, because `nn.Module` makes every assignment to its attributes slow.
    """

    config: Config
    backend: Backend
    driver: ScheduleDriver
    progress: ProgressReporter
    window: LossWindow
    rollback: Rollback | None
    recorder: StepRecorder | None = None
    is_trial: bool = False
    """Whether this is a trial run, which saves nothing and ends when the recorder says so."""
    counters: Counters = field(default_factory=Counters)
    steps_before: int = 0
    """Applied steps of earlier runs: those in the checkpoint that was loaded."""
    boundary: bool | None = None
    """Set by `Engine.set_gradient_accumulation_boundary`; None: by the count of micro-batches."""
    micro_batches: int = 0
    """Micro-batches since the last optimizer step."""
    scaled_losses: int = 0
    """Losses since the last optimizer step that were scaled for the backward pass."""

    @classmethod
    def start(
        cls,
        config: Config,
        backend: Backend,
        scheduler: LRScheduler | None,
        monitors: Sequence[Monitor] = (),
    ) -> TrainingRun:
        """Return a run before its first step."""
        is_first = backend.ranks.rank == 0
        driver = ScheduleDriver(scheduler, backend.mean, config.report if is_first else None)
        progress = ProgressReporter(config, monitors, backend.mean, writes_log=is_first)
        is_needed = driver.feedback == "loss" or progress.is_monitored
        window = LossWindow(backend.mean, is_kept=is_needed)
        rolls_back = isinstance(config.schedule, AutoWU) and config.schedule.rollback
        rollback = Rollback(backend) if rolls_back else None
        return cls(config, backend, driver, progress, window, rollback)

    def start_trial(self, recorder: StepRecorder, schedule: Schedule[Any]) -> TrainingRun:
        """Return a trial run of the same training by another schedule, which leaves no files."""
        config = self.config.for_trial_run(schedule)
        trial = self.start(config, self.backend, bind(schedule, self.backend.optimizer))
        trial.record_steps(recorder, is_trial=True)
        return trial

    def check_between_steps(self) -> None:
        """Reject a trial run whose start would discard accumulated gradients.

        Raises:
            ValueError: an accumulation window has started.
        """
        if self.micro_batches:
            raise ValueError(
                "an LR range test must start between optimizer steps, but an accumulation window "
                "has started, whose gradients would be lost; train to its end first."
            )

    def record_steps(self, recorder: StepRecorder, *, is_trial: bool) -> None:
        """Pass every step to a recorder from now on."""
        self.recorder, self.is_trial, self.window.is_kept = recorder, is_trial, True

    @property
    def scheduler(self) -> LRScheduler | None:
        """The scheduler that is stepped after each applied step."""
        return self.driver.scheduler

    @property
    def is_over(self) -> bool:
        """Whether the steps that ``engine.steps_this_run`` gives this run were applied."""
        limit = self.config.run.get("steps_this_run")
        return limit is not None and self.counters.applied_steps - self.steps_before >= limit

    def is_boundary(self) -> bool:
        """Return whether the next micro-batch completes a batch."""
        if self.boundary is not None:
            return self.boundary
        return (self.counters.micro_steps + 1) % self.config.batch.accumulation == 0

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, which the backward pass scales."""
        self.scaled_losses += 1
        self.window.add(loss)
        self.progress.add(loss)

    def step(self, metric: Tensor | float | None) -> bool:
        """Count a micro-batch; step the optimizer if it completes a batch. See `Engine.step`."""
        if self.is_trial and self.recorder is not None:
            self.recorder.stop_if_over()  # again, if the script caught the exception
        if self.is_over:
            raise RuntimeError(
                f"the run must end after {self.config.run['steps_this_run']} updates "
                "(`engine.steps_this_run`), which are done; leave the loop when `run_is_over`."
            )
        if metric is not None:
            self.driver.metric = metric
        counters = self.counters
        is_boundary = self.is_boundary()
        counters.micro_steps += 1
        self.micro_batches += 1
        counters.applied = is_boundary and self._step_optimizer()
        if is_boundary:
            self._finish_step()
        return counters.applied

    def _step_optimizer(self) -> bool:
        scaled, self.scaled_losses = self.scaled_losses, 0
        if scaled:
            return self.backend.step()
        if self.backend.loss_scale != 1.0:
            raise RuntimeError(
                "in fp16 a loss must be scaled, but neither `engine.backward(loss)` nor "
                "`engine.scale(loss).backward()` was called in this update; call one of them."
            )
        return self.backend.step(divide_by=self.config.batch.accumulation)

    def _finish_step(self) -> None:
        """Count, report and record the step, then advance the schedule: what it used is gone."""
        counters = self.counters
        self.micro_batches = 0
        counters.global_steps += 1
        if not counters.applied:
            counters.skipped_steps += 1
            log.warning(
                "update %d skipped: its gradients are not finite (%d skipped so far)",
                counters.global_steps,
                counters.skipped_steps,
            )
        if self.progress.needs_record(counters):
            self.progress.report(self._collect_record())
        # Without losses, the gradients came from the script's own `loss.backward()`.
        if self.recorder is not None and (self.window.has_losses or self.is_trial):
            self._note(self.recorder)
        if counters.applied:
            self.driver.step(self.window)
            if self.rollback is not None:
                self.rollback.follow(self.scheduler)
        self.window.clear()

    def _collect_record(self) -> StepRecord:
        counters, backend = self.counters, self.backend
        return StepRecord(
            step=counters.applied_steps - 1,
            global_steps=counters.global_steps,
            is_applied=counters.applied,
            skipped_steps=counters.skipped_steps,
            lr=self.read_lr(),
            momentum=self.read_momentum(),
            weight_decay=backend.optimizer.param_groups[0].get("weight_decay"),
            loss=self.window.mean() if self.window.has_losses else None,
            grad_norm=backend.grad_norm,
            loss_scale=backend.loss_scale if self.config.precision == "fp16" else None,
            batch_size=self.config.batch.train,
        )

    def _note(self, recorder: StepRecorder) -> None:
        momentum = self.read_momentum()
        used = self.read_lr()[0], momentum[0] if momentum else None
        recorder.note(*used, self.window.mean(), applied=self.counters.applied)
        if self.is_trial:
            recorder.stop_if_over()

    def read_lr(self) -> list[float]:
        """Return the learning rate of each param group."""
        return [float(group["lr"]) for group in self.backend.optimizer.param_groups]

    def read_momentum(self) -> list[float] | None:
        """Return the momentum or first beta of each param group; None if there is none."""
        momenta = momenta_of(self.backend.optimizer)
        if momenta is None:
            return None
        return [of if isinstance(of, float) else float(of[0]) for of in momenta]


@contextlib.contextmanager
def preserve(model: nn.Module, backend: Backend, loader: DataLoader[Any] | None) -> Iterator[None]:
    """Restore everything that training changes after the block, also after an exception.

    Args:
        model: module whose training mode is restored, with that of each module inside.
        backend: restores model, optimizer and loss scale; the gradients are cleared.
        loader: data loader whose position is restored, if it is one of `initialize`.
    """
    data = (loader.state_dict(), loader.resumes) if isinstance(loader, RunLoader) else None
    modes = {module: module.training for module in model.modules()}
    randomness, snapshot = random_state(), backend.snapshot()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        backend.zero_grad()
        backend.restore(snapshot)
        load_random_state(randomness)
        if isinstance(loader, RunLoader) and data is not None:
            loader.load_state_dict(data[0], resumes=data[1])

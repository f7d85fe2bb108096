"""The class `TrainingRun`, which stores the state of a training run and runs its steps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from engine.backends.base import Backend
from engine.checkpoint.rollback import Rollback
from engine.config import Config
from engine.config.batch_sizes import BatchSizes
from engine.config.wording import count_noun
from engine.errors import MisuseError
from engine.training.accumulation import Accumulation
from engine.training.best_metric import BestMetric
from engine.training.data import call_on_batches, repeat_batches
from engine.training.divergence import DivergenceCheck
from engine.training.evaluation import preserve_modes
from engine.training.loader import RunLoader
from engine.training.loss_window import LossWindow
from engine.training.misuse import MisuseChecks
from engine.training.monitors import Monitors
from engine.training.progress import Counters, ProgressReporter, StepRecord, StepRecorder
from engine.training.rng import preserve_rng_state
from engine.training.run_length import RunLength
from engine.training.schedule_driver import ScheduleDriver
from schedules import AutoWU, Schedule, ScheduleBinder
from schedules.param_groups import read_lr, read_momentum
from schedules.torch_scheduler import bind

__all__ = ["TrainingRun", "evaluate_batch", "iterate_batches", "preserve_state", "train_pipeline"]

log = logging.getLogger("onecycle")


@dataclass
class TrainingRun:
    """The state of a training run.

    During an LR range test, the engine temporarily uses a second run, called the trial run. The
    state is not stored in `Engine`, because setting an attribute of an `nn.Module` is slow.
    """

    config: Config
    backend: Backend
    driver: ScheduleDriver
    progress: ProgressReporter
    window: LossWindow
    rollback: Rollback | None
    accumulation: Accumulation
    length: RunLength
    divergence: DivergenceCheck
    misuse: MisuseChecks
    best: BestMetric | None = None
    recorder: StepRecorder | None = None
    is_trial: bool = False
    """Whether this run is part of an LR range test, which saves no checkpoints.

    `recorder` decides when the test ends. With `onecycle lr-test`, only one engine of the script
    has a recorder.
    """
    counters: Counters = field(default_factory=Counters)

    @classmethod
    def start(
        cls,
        config: Config,
        backend: Backend,
        scheduler: LRScheduler | None,
        monitors: Monitors | None = None,
        *,
        misuse: MisuseChecks | None = None,
    ) -> TrainingRun:
        """Build a run at step 0. For a trial run, pass the checks of the main run as ``misuse``."""
        is_first = backend.ranks.rank == 0
        driver = ScheduleDriver(scheduler, config.report if is_first else None)
        monitors = monitors or Monitors()
        progress = ProgressReporter(config, monitors, backend.mean, is_first=is_first)
        is_needed = driver.feedback == "loss" or progress.is_monitored
        window = LossWindow(backend.mean, is_kept=is_needed)
        is_dynamic = config.loss_scaling is not None and config.loss_scaling.loss_scale == 0
        rolls_back = isinstance(config.schedule, AutoWU) and config.schedule.rollback
        rollback = Rollback(backend) if rolls_back else None
        best = config.checkpoint.best
        return cls(
            config,
            backend,
            driver,
            progress,
            window,
            rollback,
            Accumulation(
                config.batch.accumulation,
                is_managed=config.raw.get("managed_gradient_accumulation", True),
            ),
            RunLength(config.run.get("steps_this_run")),
            # A dynamic loss scale skips steps until it is low enough, and ends the run itself.
            DivergenceCheck(None if is_dynamic else config.max_skipped_steps),
            misuse or MisuseChecks(backend),
            None if best is None else BestMetric(best.metric, best.mode, best.patience),
        )

    def start_trial(self, recorder: StepRecorder, schedule: Schedule[Any]) -> TrainingRun:
        """Build a trial run with another schedule on the same backend.

        The trial run writes no files.
        """
        config = self.config.copy_for_trial_run(schedule)
        binder = bind(schedule, self.backend.optimizer)
        trial = self.start(config, self.backend, binder, misuse=self.misuse)
        trial.record_steps(recorder, is_trial=True)
        return trial

    def record_steps(self, recorder: StepRecorder, *, is_trial: bool) -> None:
        """Record every step with ``recorder`` from now on."""
        self.recorder, self.is_trial, self.window.is_kept = recorder, is_trial, True

    @property
    def scheduler(self) -> LRScheduler | None:
        """The learning-rate scheduler, stepped after each applied optimizer step; may be None."""
        return self.driver.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: LRScheduler | None) -> None:
        self.driver.scheduler = scheduler
        self.window.is_kept |= self.driver.feedback == "loss"

    @property
    def is_over(self) -> bool:
        """Whether the run has reached its end, or stops early because a metric has not improved."""
        is_early = self.best is not None and self.best.is_exhausted
        return is_early or self.length.is_over(self.counters)

    def set_batch_sizes(self, batch: BatchSizes) -> None:
        """Change the batch sizes of the following steps.

        Raises:
            RuntimeError: the current batch is incomplete.
        """
        if self.accumulation.micro_batches:
            raise MisuseError(
                "The batch size must be changed between two optimizer steps, got a change after "
                f"{count_noun(self.accumulation.micro_batches, 'micro-batch')} of a step. Change "
                "the batch size right after a `trainer.step()` that runs the optimizer."
            )
        self.config = replace(self.config, batch=batch)
        self.accumulation.steps = batch.accumulation
        self.backend.set_batch_sizes(batch)

    def restore_counters(self, counters: Counters) -> None:
        """Restore the counters of a checkpoint, so that the run continues at the saved step."""
        self.counters = counters
        self.length.steps_before = counters.applied_steps
        self.accumulation.restart(counters.micro_steps)
        self.misuse.restart()
        self.window.clear()
        self.backend.zero_grad()

    def end_epoch(self) -> None:
        """Discard the gradients of a batch that is incomplete when the data of an epoch ends.

        Raises:
            RuntimeError: in two consecutive epochs, `backward` was called, but `step` was not.
        """
        accumulation = self.accumulation
        self.misuse.check_epoch(self.counters.micro_steps, accumulation)
        if accumulation.micro_batches == 0 or accumulation.boundary is not None:
            return
        log.info(
            "the epoch ended after %d of %d micro-batches of a step; their gradients are discarded",
            accumulation.micro_batches,
            accumulation.steps,
        )
        self.backend.zero_grad()
        self.counters.micro_steps -= accumulation.micro_batches
        accumulation.restart()
        self.window.clear()

    def add_loss(self, loss: Tensor) -> None:
        """Record the loss of a micro-batch that was passed to `backward` or `scale`."""
        self.accumulation.scaled_losses += 1
        self.divergence.last_loss = loss.detach()
        self.window.add(loss)
        self.progress.add(loss)

    def step(self, metric: Tensor | float | None) -> bool:
        """Finish a micro-batch, and take an optimizer step if it completes a batch.

        Returns:
            Whether an optimizer step was applied.
        """
        self._check_may_step()
        if metric is not None:
            metric = self.driver.metric = self.backend.mean(float(metric))
        counters, accumulation = self.counters, self.accumulation
        is_boundary = accumulation.is_boundary()
        self.misuse.check_step(self.scheduler, accumulation, is_boundary=is_boundary)
        counters.micro_steps += 1
        accumulation.micro_batches += 1
        accumulation.has_gradients = not is_boundary and self.backend.has_gradients()
        counters.applied = is_boundary and self._step_optimizer()
        if is_boundary:
            self._finish_step()
            self.misuse.note_step(self.scheduler, counters.global_steps)
        if metric is not None and self.best is not None:
            self._update_best(metric)
        return counters.applied

    def _check_may_step(self) -> None:
        if not self.accumulation.averages_gradients:
            raise MisuseError(
                "`step()` must not be called inside `no_sync()`. Leave the context first."
            )
        if self.is_trial and self.recorder is not None:
            # A script may catch the exception that ends the run; in that case, raise it again.
            self.recorder.stop_if_over()
        if self.length.is_session_over(self.counters):
            raise RuntimeError(
                f"The run has ended after {self.config.run['steps_this_run']} steps "
                "(`engine.steps_this_run`). Exit the training loop when `trainer.run_is_over` is "
                "true."
            )

    def report(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Average metrics over the ranks, and report them to the log and the monitors."""
        means = {name: self.backend.mean(float(value)) for name, value in metrics.items()}
        self.progress.report_metrics(means, self.counters)
        if self.best is not None and self.best.name in means:
            self.driver.metric = means[self.best.name]
            self._update_best(means[self.best.name])

    def _update_best(self, value: float) -> None:
        best, was_over = self.best, self.is_over
        assert best is not None
        best.update(value, self.counters.global_steps)
        if best.is_exhausted and not was_over and self.backend.ranks.rank == 0:
            log.info(
                "stopping early: %s has not improved in %d reports; the best value is %g, at step "
                "%d",
                best.name,
                best.misses,
                best.value,
                best.step,
            )

    def _step_optimizer(self) -> bool:
        scaled, self.accumulation.scaled_losses = self.accumulation.scaled_losses, 0
        if not self.accumulation.is_managed:
            self.accumulation.micro_batches = scaled
        if scaled:
            return self.backend.step()
        if self.backend.loss_scale != 1.0:
            raise RuntimeError(
                "fp16 needs a scaled loss, but neither `trainer.backward(loss)` nor "
                "`trainer.scale(loss).backward()` was called in this step. Call one of them "
                "instead of `loss.backward()`."
            )
        return self.backend.step(divide_by=self.accumulation.steps)

    def _finish_step(self) -> None:
        """Count and report a step, and step the scheduler if the optimizer step was applied."""
        counters, batch = self.counters, self.config.batch
        counters.global_steps += 1
        counters.global_samples += (
            batch.train
            if self.accumulation.is_managed
            else batch.micro * batch.data_ranks * self.accumulation.micro_batches
        )
        self.accumulation.micro_batches = 0
        if not counters.applied:
            counters.skipped_steps += 1
            self.progress.clear_losses()
            log.warning(
                "skipped step %d because of non-finite gradients (%d skipped so far)",
                counters.global_steps,
                counters.skipped_steps,
            )
        if self.progress.needs_record(counters):
            self.progress.report(self._collect_record())
        if self.progress.has_bar:
            last = self.length.find_last_step(counters, self.config.batch.train)
            self.progress.move_bar(counters.global_steps, last)
        # The window is empty if the script calls `loss.backward()` itself.
        if self.recorder is not None and (self.window.has_losses or self.is_trial):
            self._record_step(self.recorder)
        if counters.applied:
            self.driver.step(self.window)
            if self.rollback is not None:
                self.rollback.update(self.scheduler)
        self.window.clear()
        if not self.is_trial:
            self.divergence.update(self.counters, read_lr(self.backend.optimizer)[0])

    def _collect_record(self) -> StepRecord:
        counters, backend = self.counters, self.backend
        groups = backend.optimizer.param_groups
        return StepRecord(
            step=counters.global_steps,
            global_samples=counters.global_samples,
            is_applied=counters.applied,
            skipped_steps=counters.skipped_steps,
            lr=read_lr(backend.optimizer),
            momentum=read_momentum(backend.optimizer),
            weight_decay=[group["weight_decay"] for group in groups if "weight_decay" in group],
            loss=self.window.mean() if self.window.has_losses else None,
            grad_norm=backend.grad_norm,
            loss_scale=backend.loss_scale if self.config.precision == "fp16" else None,
            batch_size=self.config.batch.train,
        )

    def _record_step(self, recorder: StepRecorder) -> None:
        momentum = read_momentum(self.backend.optimizer)
        used = read_lr(self.backend.optimizer)[0], momentum[0] if momentum else None
        recorder.record(*used, self.window.mean(), applied=self.counters.applied)
        if self.is_trial:
            recorder.stop_if_over()


def train_pipeline(
    batches: Iterator[Any] | None, loader: RunLoader | None, run: TrainingRun
) -> Tensor | None:
    """Train a pipeline model on one batch, and return the mean loss.

    If the model is not a pipeline, return None.

    Args:
        batches: iterator over micro-batches; default: the batches of ``loader``.
        loader: data loader of the run. If ``batches`` and ``loader`` are None, the pipeline uses
            the data that was passed to its ``set_dataloader``.
        run: state of the run.
    """
    batches = batches or (repeat_batches(loader) if loader is not None else None)
    run._check_may_step()  # noqa: SLF001  # private to this module
    run.misuse.check_step(run.scheduler, run.accumulation, is_boundary=False)
    result = run.backend.run_pipeline(batches, trains=True)
    if result is None:
        return None
    loss, run.counters.applied = result
    run.counters.micro_steps += run.accumulation.steps
    run.add_loss(loss)
    run.accumulation.scaled_losses = 0
    run._finish_step()  # noqa: SLF001  # private to this module
    run.misuse.note_step(run.scheduler, run.counters.global_steps)
    return loss


def evaluate_batch(model: nn.Module, batches: Iterator[Any], run: TrainingRun) -> Tensor:
    """Evaluate the model on as many micro-batches as a step uses; return their mean loss."""
    if result := run.backend.run_pipeline(batches, trains=False):
        return result[0]
    losses = call_on_batches(model, batches, run.accumulation.steps)
    return torch.stack(list(losses)).mean()


def iterate_batches(loader: RunLoader | None, run: TrainingRun) -> Iterator[Any]:
    """Return an iterator over the batches of a run; see `Engine.batches`."""
    if loader is None:
        raise MisuseError(
            "`trainer.batches()` needs training data. Pass `training_data` to `initialize`, or "
            "your data loader to `trainer.prepare`."
        )
    if not (run.length.is_known or run.is_trial):
        scheduler = run.scheduler
        run.length.schedule_steps = (
            scheduler.length if isinstance(scheduler, ScheduleBinder) else None
        )
        if not run.length.is_known:
            raise MisuseError(
                "The length of the run is unknown, because the run has no schedule that ends. Set "
                '`engine.max_duration`, for example to "10ep".'
            )
    if run.is_over and run.backend.ranks.rank == 0:
        log.info("the run is already over at step %d; nothing to train", run.counters.global_steps)
    return _iterate_epochs(loader, run)


def _iterate_epochs(loader: RunLoader, run: TrainingRun) -> Iterator[Any]:
    while not run.is_over:
        steps = run.counters.global_steps
        try:
            yield from loader
        finally:
            # If the script leaves its loop within an epoch, the next loop continues the epoch.
            loader.load_state_dict(loader.state_dict())
        if run.counters.global_steps == steps:
            raise MisuseError(
                "An epoch of the training data ended without an optimizer step. Call "
                "`trainer.step()` after each `trainer.backward(loss)`, and check that the data has "
                f"at least {count_noun(run.accumulation.steps, 'micro-batch')}."
            )


@contextlib.contextmanager
def preserve_state(model: nn.Module, backend: Backend, loader: RunLoader | None) -> Iterator[None]:
    """Restore the training state when the context exits, even after an exception.

    Args:
        model: module whose training mode is restored, including that of each submodule.
        backend: backend whose model, optimizer and loss scale are restored, and whose gradients are
            cleared.
        loader: data loader whose position is restored, or None.
    """
    data = None if loader is None else (loader.state_dict(), loader.resumes)
    with preserve_rng_state():
        snapshot = backend.snapshot()
        try:
            with preserve_modes(model):
                yield
        finally:
            backend.zero_grad()
            backend.restore(snapshot)
            if loader is not None and data is not None:
                loader.load_state_dict(data[0], resumes=data[1])

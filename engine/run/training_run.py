"""Track the state of a training run, and take its optimizer steps."""

from __future__ import annotations

import atexit
import functools
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from engine.backends.base import Backend, DeferringBackend
from engine.checkpoint.rollback import Rollback
from engine.config import Config
from engine.config.batch_sizes import BatchSizes
from engine.config.wording import count_noun
from engine.distributed.waiting import warn_of_long_wait
from engine.errors import MisuseError
from engine.training.accumulation import Accumulation
from engine.training.best_metric import BestMetric
from engine.training.deferred_step import StepResult
from engine.training.divergence import DivergenceCheck
from engine.training.loss_window import LossWindow
from engine.training.misuse import MisuseChecks
from engine.training.monitors import Monitors
from engine.training.progress import Counters, ProgressReporter, StepRecord, StepRecorder
from engine.training.run_length import RunLength
from engine.training.schedule_driver import ScheduleDriver
from schedules import AutoWU, Schedule, ScheduleBinder
from schedules.param_groups import read_lr, read_momentum
from schedules.torch_scheduler import bind

__all__ = ["TrainingRun"]

log = logging.getLogger("onecycle")


@dataclass
class TrainingRun:
    """The state of a training run.

    During an LR range test, the engine temporarily uses a second `TrainingRun`, the trial run. The
    state is not stored in `Engine`, because setting attributes of an `nn.Module` is slow.
    """

    config: Config
    backend: Backend
    _driver: ScheduleDriver
    progress: ProgressReporter
    _window: LossWindow
    rollback: Rollback | None
    accumulation: Accumulation
    length: RunLength
    _divergence: DivergenceCheck
    misuse: MisuseChecks
    best: BestMetric | None = None
    _recorder: StepRecorder | None = None
    is_trial: bool = False
    """Whether the run is part of an LR range test and therefore saves no checkpoints."""
    latest: Counters = field(default_factory=Counters)
    """The step counters. While a step is deferred, `skipped_steps` and `applied` are not final."""
    _deferring: DeferringBackend | None = None
    """The backend if it can defer steps; None otherwise."""
    _pending: tuple[StepResult, LossWindow] | None = None
    """The deferred step and its losses; None if no step is deferred."""

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
        """Build a run that starts at step 0.

        For the trial run of an LR range test, pass the checks of the main run as ``misuse``.
        """
        is_first = backend.ranks.rank == 0
        monitors = monitors or Monitors()
        directory = config.report.directory if config.report is not None and is_first else None
        driver = ScheduleDriver(scheduler, directory, monitors.note_decision)
        progress = ProgressReporter(config, monitors, backend.mean, is_first=is_first)
        is_needed = driver.feedback == "loss" or progress.is_monitored
        window = LossWindow(backend.mean, is_kept=is_needed)
        is_dynamic = config.loss_scaling is not None and config.loss_scaling.loss_scale == 0
        rolls_back = isinstance(config.schedule, AutoWU) and config.schedule.rollback
        rollback = Rollback(backend) if rolls_back else None
        best = config.checkpoint.best
        run = cls(
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
            # With a dynamic loss scale, steps are skipped until the scale is low enough. The loss
            # scaler ends a diverging run itself.
            DivergenceCheck(None if is_dynamic else config.max_skipped_steps),
            misuse or MisuseChecks(backend),
            None if best is None else BestMetric(best.metric, best.mode, best.patience),
        )
        if isinstance(backend, DeferringBackend) and backend.deferred is not None:
            run._deferring = backend
            run._window.is_kept |= config.progress.is_logged
            run._settle_before_use(scheduler)
            atexit.register(_settle, weakref.ref(run))  # write the last step to the monitors
        return run

    def start_trial(self, recorder: StepRecorder, schedule: Schedule[Any]) -> TrainingRun:
        """Build a trial run for an LR range test.

        The trial run uses the backend of this run, follows ``schedule``, and writes no files.
        """
        self.settle()
        config = self.config.copy_for_trial_run(schedule)
        binder = bind(schedule, self.backend.optimizer)
        trial = self.start(config, self.backend, binder, misuse=self.misuse)
        trial.record_steps(recorder, is_trial=True)
        return trial

    def record_steps(self, recorder: StepRecorder, *, is_trial: bool) -> None:
        """Start recording every step with ``recorder``, and set `is_trial`."""
        self.settle()
        self._recorder, self.is_trial, self._window.is_kept = recorder, is_trial, True

    @property
    def scheduler(self) -> LRScheduler | None:
        """The learning-rate scheduler; None if the run has none.

        The scheduler advances after each applied optimizer step.
        """
        return self._driver.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: LRScheduler | None) -> None:
        self.settle()
        self._driver.scheduler = scheduler
        self._settle_before_use(scheduler)
        self._window.is_kept |= self._driver.feedback == "loss"

    @property
    def is_over(self) -> bool:
        """Whether the run has reached its end or has been stopped early."""
        is_early = self.best is not None and self.best.is_exhausted
        # The outcome of a deferred step matters only close to the end.
        return is_early or (self.length.is_over(self.latest) and self.length.is_over(self.counters))

    @property
    def counters(self) -> Counters:
        """The step counters. Reading them completes a deferred step first."""
        self.settle()
        return self.latest

    @counters.setter
    def counters(self, counters: Counters) -> None:
        self.latest = counters

    @property
    def settled_backend(self) -> Backend:
        """The backend. Reading this attribute completes a deferred step first."""
        self.settle()
        return self.backend

    @property
    def defers(self) -> bool:
        """Whether steps are deferred; see `DeferredStep`."""
        scheduler = self._driver.scheduler
        return (
            self._deferring is not None
            and not self.is_trial
            and self._recorder is None
            and self.rollback is None
            and not self.config.diagnostics.wall_clock_breakdown
            and (scheduler is None or isinstance(scheduler, ScheduleBinder))
        )

    def settle(self) -> None:
        """Wait for the deferred step, if there is one, and complete it.

        The ranks may call this method at different times.

        Raises:
            FloatingPointError: training has diverged.
        """
        if self._pending is None or self._deferring is None:
            return
        (result, window), self._pending = self._pending, None
        self.latest.applied = result.is_applied = False
        self.latest.applied, loss = self._deferring.finish_step()
        result.is_applied = self.latest.applied
        if window.has_losses:
            window.set_mean(loss)
            self.progress.add_mean(loss, window.count)
            self._divergence.last_loss = loss
        self._complete_step(window)
        self.misuse.note_scheduler(self.scheduler)

    def _settle_before_use(self, scheduler: LRScheduler | None) -> None:
        """Ensure that a deferred step is completed before the script uses ``scheduler``."""
        if self._deferring is not None and isinstance(scheduler, ScheduleBinder):
            scheduler.before_use = functools.partial(_settle, weakref.ref(self))

    def set_batch_sizes(self, batch: BatchSizes) -> None:
        """Change the batch sizes for the following steps.

        Raises:
            RuntimeError: the method is called in the middle of a batch.
        """
        if self.accumulation.micro_batches:
            raise MisuseError(
                "The batch size must not change in the middle of a batch "
                f"({count_noun(self.accumulation.micro_batches, 'micro-batch')} since the last "
                "optimizer step). Change the batch size right after a call to "
                "`trainer.step()` that takes an optimizer step."
            )
        self.settle()
        self.config = replace(self.config, batch=batch)
        self.accumulation.steps = batch.accumulation
        self.backend.set_batch_sizes(batch)

    def restore_counters(self, counters: Counters) -> None:
        """Restore the step counters from a checkpoint to continue at the saved step."""
        self.latest = counters
        self.length.steps_before = counters.applied_steps
        self.accumulation.restart(counters.micro_steps)
        self.misuse.restart()
        self._window.clear()
        self.backend.zero_grad()

    def end_epoch(self) -> None:
        """Discard the gradients of an unfinished batch at the end of an epoch.

        Raises:
            RuntimeError: in two consecutive epochs, `backward` was called but `step` was not.
        """
        accumulation = self.accumulation
        self.misuse.check_epoch(self.latest.micro_steps, accumulation)
        if accumulation.micro_batches == 0 or accumulation.boundary is not None:
            return
        log.info(
            "the epoch ended after %d of the %d micro-batches of a step; discarding their "
            "gradients",
            accumulation.micro_batches,
            accumulation.steps,
        )
        self.backend.zero_grad()
        self.latest.micro_steps -= accumulation.micro_batches
        accumulation.restart()
        self._window.clear()

    def add_loss(self, loss: Tensor) -> None:
        """Record a loss. The caller must detach it from the graph first."""
        self.accumulation.scaled_losses += 1
        self._window.add(loss)
        if self._deferring is None or not self.defers:
            self._divergence.last_loss = loss
            self.progress.add(loss)

    def step(self, metric: Tensor | float | None) -> bool | StepResult:
        """Finish a micro-batch, and take an optimizer step if the batch is complete.

        Returns:
            Whether an optimizer step was applied; a `StepResult` if the step is deferred.
        """
        self._check_may_step()
        counters, accumulation, scheduler = self.latest, self.accumulation, self._driver.scheduler
        is_boundary = accumulation.is_boundary()
        self.misuse.check_step(scheduler, accumulation, is_boundary=is_boundary)
        if self._pending is not None:  # the device now has the next backward pass to work on
            self.settle()
        if metric is not None:
            metric = self._driver.metric = self.backend.mean(float(metric))
        counters.micro_steps += 1
        accumulation.micro_batches += 1
        accumulation.has_gradients = not is_boundary and self.backend.has_gradients()
        with self.misuse.engine_step:
            counters.applied = is_boundary and self._step_optimizer()
        if is_boundary:
            self._finish_step()
            self.misuse.note_step(scheduler, counters.global_steps)
        if metric is not None and self.best is not None:
            self._update_best(metric)
        return counters.applied if self._pending is None else self._pending[0]

    def _check_may_step(self) -> None:
        if not self.accumulation.averages_gradients:
            raise MisuseError(
                "`step()` must not be called inside `no_sync()`. Exit the context first."
            )
        if self.is_trial and self._recorder is not None:
            # A script may catch the exception that ends the run; in that case, raise it again.
            self._recorder.stop_if_over()
        is_over = self.length.is_session_over
        if is_over(self.latest) and is_over(self.counters):
            raise RuntimeError(
                f"The run has ended after {self.config.run['steps_this_run']} steps, as set by "
                "`engine.steps_this_run`. Exit the training loop when `trainer.run_is_over` is "
                "true."
            )

    def report(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Average metrics over the ranks, and report them to the log and the monitors."""
        self.settle()
        with warn_of_long_wait("report", self.backend.ranks):
            means = {name: self.backend.mean(float(value)) for name, value in metrics.items()}
        self.progress.report_metrics(means, self.counters)
        if self.best is not None and self.best.name in means:
            self._driver.metric = means[self.best.name]
            self._update_best(means[self.best.name])

    def _update_best(self, value: float) -> None:
        best, was_over = self.best, self.is_over
        assert best is not None
        best.update(value, self.latest.global_steps)
        if best.is_exhausted and not was_over and self.backend.ranks.rank == 0:
            log.info(
                "stopping early: %s has not improved in the last %s; the best value is %g, at step "
                "%d",
                best.name,
                count_noun(best.misses, "reported value"),
                best.value,
                best.step,
            )

    def _step_optimizer(self) -> bool:
        scaled, self.accumulation.scaled_losses = self.accumulation.scaled_losses, 0
        if not self.accumulation.is_managed:
            self.accumulation.micro_batches = scaled
        if self._deferring is not None and self.defers:
            self._start_step(self._deferring, is_scaled=scaled > 0)
            return False
        if scaled:
            return self.backend.step()
        self._check_is_not_scaled()
        return self.backend.step(divide_by=self.accumulation.steps)

    def _start_step(self, backend: DeferringBackend, *, is_scaled: bool) -> None:
        """Start a deferred step. `settle` completes the step."""
        if not is_scaled:
            self._check_is_not_scaled()
        divide_by = 1 if is_scaled else self.accumulation.steps
        backend.start_step(self._window.compute_local_mean(), divide_by=divide_by)
        self._pending = StepResult(self.settle), self._window
        self._window = self._window.renew()

    def _check_is_not_scaled(self) -> None:
        if self.backend.loss_scale != 1.0:
            raise RuntimeError(
                "fp16 requires a scaled loss. Call `trainer.backward(loss)` or "
                "`trainer.scale(loss).backward()` instead of `loss.backward()`."
            )

    def _finish_step(self) -> None:
        """Count a step, and complete it unless it is deferred."""
        counters, batch = self.latest, self.config.batch
        counters.global_steps += 1
        counters.global_samples += (
            batch.train
            if self.accumulation.is_managed
            else batch.micro * batch.data_ranks * self.accumulation.micro_batches
        )
        self.accumulation.micro_batches = 0
        if self._pending is None:
            self._complete_step(self._window)

    def _complete_step(self, window: LossWindow) -> None:
        """Report an optimizer step, and advance the scheduler if the step was applied."""
        counters = self.latest
        if not counters.applied:
            counters.skipped_steps += 1
            self.progress.clear_losses()
            log.warning(
                "skipped step %d because of non-finite gradients (%d skipped so far)",
                counters.global_steps,
                counters.skipped_steps,
            )
        if self.progress.needs_record(counters):
            self.progress.report(self._collect_record(window))
        if self.progress.has_bar:
            last = self.length.find_last_step(counters, self.config.batch.train)
            self.progress.move_bar(counters.global_steps, last)
        # The window is empty if the script calls `loss.backward()` itself.
        if self._recorder is not None and (window.has_losses or self.is_trial):
            self._record_step(self._recorder)
        if counters.applied:
            self._driver.step(window)
            if self.rollback is not None:
                self.rollback.update(self.scheduler)
        window.clear()
        if not self.is_trial:
            self._divergence.update(counters, read_lr(self.backend.optimizer)[0])

    def _collect_record(self, window: LossWindow) -> StepRecord:
        counters, backend = self.latest, self.backend
        groups = backend.optimizer.param_groups
        return StepRecord(
            step=counters.global_steps,
            global_samples=counters.global_samples,
            is_applied=counters.applied,
            skipped_steps=counters.skipped_steps,
            lr=read_lr(backend.optimizer),
            momentum=read_momentum(backend.optimizer),
            weight_decay=[group["weight_decay"] for group in groups if "weight_decay" in group],
            loss=window.mean() if window.has_losses else None,
            grad_norm=backend.grad_norm,
            loss_scale=backend.loss_scale if self.config.precision == "fp16" else None,
            batch_size=self.config.batch.train,
        )

    def _record_step(self, recorder: StepRecorder) -> None:
        momentum = read_momentum(self.backend.optimizer)
        used = read_lr(self.backend.optimizer)[0], momentum[0] if momentum else None
        recorder.record(*used, self._window.mean(), applied=self.counters.applied)
        if self.is_trial:
            recorder.stop_if_over()


def _settle(reference: weakref.ref[TrainingRun]) -> None:
    run = reference()
    if run is not None:
        run.settle()

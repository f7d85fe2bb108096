"""Save checkpoints according to the config, and resume from the newest checkpoint."""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from engine.checkpoint import storage
from engine.checkpoint.async_saver import exit_with_failure
from engine.checkpoint.collectives import call_on_rank_0, find_missing_ranks
from engine.checkpoint.manager import Checkpointer
from engine.checkpoint.run_interface import RunState
from engine.config import CheckpointPlan
from engine.config.wording import count_noun
from engine.distributed.environment import INTERRUPTED, SAVED_AND_ENDED
from engine.distributed.ranks import Ranks
from engine.distributed.signals import Signals
from engine.errors import MisuseError
from engine.training.progress import Counters
from engine.training.run_length import RunLength
from schedules import ScheduleBinder

__all__ = ["AutomaticCheckpoints"]

log = logging.getLogger("onecycle")

_BEST = "best"
_USERS: weakref.WeakValueDictionary[str, AutomaticCheckpoints] = weakref.WeakValueDictionary()
"""Maps each checkpoint directory to the newest `AutomaticCheckpoints` object in this process."""


class SteppedRun(RunState, Protocol):
    """Protocol for the training run that `AutomaticCheckpoints.save_if_due` receives."""

    length: RunLength
    latest: Counters
    """The step counters, which can be read without waiting for the device.

    Unlike `RunState.counters`, they may not yet show whether the most recent step was skipped.
    """

    @property
    def defers(self) -> bool:
        """Whether the engine's `step` can return before the device finishes the optimizer step."""
        ...


@dataclass
class _End:
    """What is known about the end of a run in this process."""

    has_trained: bool = False
    """Whether this process has taken a step."""
    logged_step: int | None = None
    """Step at which the end of the run was logged."""


class AutomaticCheckpoints:
    """Manager that saves and loads the checkpoints of a run automatically.

    Call each method on every rank. If ``engine.checkpoint.dir`` is not set, no checkpoints are
    saved or loaded.

    Args:
        plan: the config's ``engine.checkpoint`` section.
        checkpointer: object that writes and reads the checkpoints.
        ranks: rank and world size of this process.
    """

    def __init__(self, plan: CheckpointPlan, checkpointer: Checkpointer, ranks: Ranks) -> None:
        self._plan = plan
        self._directory = None if plan.dir is None else Path(plan.dir)
        self._checkpointer = checkpointer
        self._ranks = ranks
        self._signals: Signals | None = None
        self._is_resumed = False
        self._end = _End()
        self._end_logger: Callable[[], object] = lambda: None

    def resume(self, run: RunState) -> bool:
        """Resume from the newest complete checkpoint if ``engine.checkpoint.resume`` allows it.

        After this call, the run saves a checkpoint when a rank receives SIGINT, SIGTERM or SIGUSR1.
        If ``engine.checkpoint.every`` is set, a single-process run also saves one when the process
        exits without an exception.

        Returns:
            Whether a checkpoint was loaded.

        Raises:
            FileNotFoundError: if all checkpoints are damaged, or if ``engine.checkpoint.resume`` is
                "must" and the directory does not contain a checkpoint.
        """
        directory, plan = self._directory, self._plan
        if self._ranks.rank == 0:
            self._end_logger = weakref.finalize(self, _log_unfinished, run, self._end)
        if directory is None:
            return False
        previous = _USERS.get(str(directory.resolve()))
        if previous is not None:
            atexit.unregister(previous._save_at_exit)  # noqa: SLF001  # the same class
        _USERS[str(directory.resolve())] = self
        if plan.every is not None:
            atexit.register(self._save_at_exit, run)
        # If every checkpoint is damaged, `load` raises, because a new run would overwrite them.
        is_loaded = plan.resume == "must" or (
            plan.resume == "auto"
            and call_on_rank_0(self._ranks, lambda: storage.has_any_checkpoint(directory))
        )
        if is_loaded:
            checkpoint_dir, _ = self._checkpointer.load(run, directory)
            self._is_resumed = True
            if self._ranks.rank == 0:
                log.info("resuming from %s at step %d", checkpoint_dir, run.counters.global_steps)
            if run.is_over:
                self._log_end(run)
        self._signals = self._signals or Signals()
        return is_loaded

    def check_loop(self, run: SteppedRun, first_epoch: int) -> None:
        """Check that the script's loop over epochs continues correctly after a resume.

        If the loop starts at epoch 0 and the run can be resumed later, log a warning.

        Args:
            run: state of the run.
            first_epoch: epoch at which the loop starts.

        Raises:
            MisuseError: the loop of a resumed run could train for too many epochs.
        """
        may_be_resumed = self._directory is not None and self._plan.resume == "auto"
        if run.is_trial or run.length.is_loop_limited:
            return
        if first_epoch > 0:
            raise MisuseError(
                "This run continues from a checkpoint, and the length of the run is unknown. A "
                "loop such as `for epoch in range(n)` would train for too many epochs. Loop over "
                "`range(trainer.epoch, n)`, or set `engine.max_duration`."
            )
        if may_be_resumed and self._ranks.rank == 0:
            log.warning(
                "after its first epoch, this run cannot be resumed automatically: a loop such as "
                "`for epoch in range(n)` would start at epoch 0 again; loop over "
                "`range(trainer.epoch, n)`, or set `engine.max_duration`"
            )

    def save_if_due(self, run: SteppedRun) -> None:
        """Save the checkpoints that are due after a step.

        Also log a warning if the script does not use the run's data loader.

        The best checkpoint is due if the metric has improved. A regular checkpoint is due at the
        interval ``engine.checkpoint.every``, and when a rank has received SIGINT, SIGTERM or
        SIGUSR1.

        Raises:
            CheckpointError: if another run writes to the checkpoint directory. Only the first call
                checks for other runs.
            MisuseError: if the script of a resumed run does not use the run's data loader, so that
                it could train for too many epochs.
            SystemExit: after the save, if a rank has received one of these signals.
        """
        directory, every = self._directory, run.length.checkpoint_interval
        if run.is_trial:
            return
        self._end.has_trained = True
        may_repeat_epochs = self._is_resumed and not run.length.is_loop_limited
        self._checkpointer.data.check_is_used(is_required=may_repeat_epochs)
        if directory is None:
            return
        # A script that only evaluates does not need a lock, so lock after the first step.
        self._checkpointer.lock(directory)
        self.save_best(run)
        received = None
        if self._signals is not None:
            received = self._signals.find_on_any_rank(self._ranks, is_deferred=run.defers)
        if received is not None or (every is not None and run.latest.global_steps % every == 0):
            self._save(run, directory)
        if received is not None:
            self._checkpointer.wait()
            step = self._end.logged_step = run.counters.global_steps
            log.warning(
                "saved a checkpoint at step %d; exiting because a rank received %s", step, received
            )
            assert self._signals is not None
            self._signals.call_script_handler()
            raise SystemExit(INTERRUPTED if received == "SIGINT" else SAVED_AND_ENDED)

    def save_best(self, run: RunState) -> None:
        """Save a new best checkpoint if the metric has improved since the previous one."""
        if self._directory is None or run.best is None or not run.best.is_unsaved:
            return
        self._save(run, self._directory, _BEST)
        run.best.is_unsaved = False

    def end_run(self, run: RunState) -> None:
        """Save a final checkpoint if the current step is unsaved, and log the end of training.

        Call this method when the run has reached its end.
        """
        if run.is_trial:
            return
        directory = self._directory
        if directory is not None and self._plan.every is not None:
            if not self._checkpointer.is_saved(run, directory):
                self._save(run, directory)
            self._checkpointer.wait()
        self._log_end(run)

    def _log_end(self, run: RunState) -> None:
        directory, step = self._directory, run.counters.global_steps
        if self._ranks.rank > 0 or self._end.logged_step == step:
            return
        self._end.logged_step = step
        parts = [f"training ended at step {step}"]
        if not self._end.has_trained:
            parts = [f"the run is already over at step {step}"]
        left = _count_steps_left(run)
        # The last of n steps is step n - 1, so a schedule of n - 1 steps also fits the run.
        if left not in (0, -1):
            steps = count_noun(abs(left), "step")
            parts.append(f"the schedule ends {steps} {'later' if left > 0 else 'earlier'}")
        if directory is not None and self._checkpointer.is_saved(run, directory):
            state = "being saved to" if self._checkpointer.is_saving else "in"
            parts.append(f"the last checkpoint is {state} {directory}")
        if directory is not None and not self._end.has_trained:
            parts.append("to start a new run, set another `engine.checkpoint.dir`")
        log.info("%s", "; ".join(parts))
        if self._end.has_trained and run.best is not None and run.best.last_step < 0:
            log.warning(
                "no best checkpoint was saved, because `trainer.report` was never called with "
                "`%s`, the metric of `engine.checkpoint.best`",
                run.best.name,
            )

    def close(self, run: RunState) -> None:
        """Save a final checkpoint if the current step is unsaved, and restore signal handlers.

        No checkpoint is saved while an exception is being handled. With several ranks, a checkpoint
        is saved only if every rank calls this method within 30 seconds.
        """
        atexit.unregister(self._save_at_exit)
        try:
            # An exception that is being handled may have interrupted a step.
            if self._directory is not None and sys.exc_info()[0] is None:
                self._save_unsaved(run, self._directory)
            self._end_logger()
        finally:
            if self._signals is not None:
                self._signals.restore_handlers()

    def _save_unsaved(self, run: RunState, directory: Path) -> None:
        if self._plan.every is None or run.is_trial or hasattr(sys, "last_value"):
            return
        if self._is_saved(run, directory):
            if self._end.has_trained and self._checkpointer.is_saved(run, directory):
                self._log_end(run)
            return
        has_group = self._ranks.world_size == 1 or dist.is_initialized()
        if has_group and not find_missing_ranks(self._ranks):
            self.end_run(run)
        else:
            self._warn_of_unsaved_steps(directory)

    def _save(self, run: RunState, directory: Path, tag: str | None = None) -> None:
        if not self._is_only_user(directory):
            raise MisuseError(
                f"`engine.checkpoint.dir` must be different for each engine in a process, but two "
                f"engines save to {directory}. Give each engine its own directory."
            )
        self._checkpointer.save(run, directory, tag, is_automatic=tag is None)

    def _save_at_exit(self, run: RunState) -> None:
        """Save a final checkpoint if a single-process run exits without an exception.

        With several ranks, log a warning instead, because other ranks may have already exited.
        """
        directory = self._directory
        if directory is None or hasattr(sys, "last_value"):
            return
        if self._is_saved(run, directory):
            if self._end.has_trained and self._checkpointer.is_saved(run, directory):
                self._log_end(run)
            return
        if self._ranks.world_size > 1:
            self._warn_of_unsaved_steps(directory)
            return
        try:
            self._checkpointer.wait()
            self._checkpointer.async_saver = None  # no thread can start while the process exits
            self.end_run(run)
        except Exception as error:  # noqa: BLE001  # the exit status reports the failure
            exit_with_failure(error)

    def _warn_of_unsaved_steps(self, directory: Path) -> None:
        if self._ranks.rank == 0:
            log.warning(
                "the steps after step %d were not saved; to save the final step, call "
                "`trainer.destroy()` on every rank at the end of the script, or set "
                "`engine.max_duration`",
                self._checkpointer.find_saved_steps(directory),
            )

    def _is_saved(self, run: RunState, directory: Path) -> bool:
        if not self._is_only_user(directory):
            return True
        is_deleted = self._checkpointer.find_saved_steps(directory) > 0 and not directory.exists()
        return is_deleted or self._checkpointer.is_saved(run, directory)

    def _is_only_user(self, directory: Path) -> bool:
        return _USERS.get(str(directory.resolve()), self) is self


def _count_steps_left(run: RunState) -> int:
    """Return the number of steps until the schedule ends; 0 if the run has no such schedule."""
    end = run.scheduler.length if isinstance(run.scheduler, ScheduleBinder) else None
    return 0 if end is None else end - run.counters.applied_steps


def _log_unfinished(run: RunState, end: _End) -> None:
    """Log the end of a run whose schedule has not ended, unless an exception was raised."""
    has_failed = sys.exc_info()[0] is not None or hasattr(sys, "last_value")
    step, left = run.counters.global_steps, _count_steps_left(run)
    if end.has_trained and end.logged_step != step and left > 0 and not has_failed:
        steps = count_noun(left, "step")
        log.info("training ended at step %d; the schedule ends %s later", step, steps)

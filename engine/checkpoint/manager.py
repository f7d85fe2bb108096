"""Save the checkpoints of a run, and resume from them."""

from __future__ import annotations

import atexit
import datetime as dt
import logging
import os
import sys
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from engine.checkpoint import storage
from engine.checkpoint.async_saver import AsyncSaver, exit_with_failure
from engine.checkpoint.collectives import check_same_tag, raise_on_all_ranks, wait_for_ranks
from engine.checkpoint.fingerprint import Identity, check_identity
from engine.checkpoint.plain_values import check_plain_values, read_values, write_values
from engine.checkpoint.rng import get_rng_state, set_rng_state
from engine.checkpoint.rollback import Rollback
from engine.checkpoint.schedule_state import adapt_schedule_state, convert_position
from engine.checkpoint.storage import Manifest
from engine.config import Config
from engine.distributed.environment import ELASTIC, INTERRUPTED, SAVED_AND_ENDED
from engine.distributed.ranks import Ranks
from engine.distributed.signals import Signals
from engine.errors import MisuseError
from engine.training.data import RunLoader
from engine.training.progress import Counters

__all__ = ["Checkpointer"]

log = logging.getLogger("onecycle")

_ENGINE = "engine.pt"
_USERS: weakref.WeakValueDictionary[str, Checkpointer] = weakref.WeakValueDictionary()
"""The last engine of this process that uses each directory for automatic checkpoints."""


class SavedBackend(Protocol):
    """The part of `engine.backends.base.Backend` that `Checkpointer` uses."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that the schedule and the user see."""
        ...

    @property
    def ranks(self) -> Ranks:
        """Rank and world size of this process."""
        ...

    def save(self, checkpoint_dir: Path, *, frozen: bool = True) -> None:
        """Write the state of the model, the optimizer and the loss scaler to a checkpoint."""
        ...

    def save_async(
        self,
        checkpoint_dir: Path,
        group: dist.ProcessGroup | None,
        buffers: dict[str, Any],
        *,
        frozen: bool = True,
    ) -> Future[None]:
        """Copy the states that `save` writes to host memory, and write them in the background."""
        ...

    def load(
        self, checkpoint_dir: Path, *, optimizer: bool, strict: bool, frozen: bool = True
    ) -> None:
        """Restore the model and, if ``optimizer`` is true, the optimizer and the loss scaler."""
        ...


class RunState(Protocol):
    """The attributes of a training run that `Checkpointer` saves and restores."""

    config: Config
    is_trial: bool
    """Whether this is an LR range test, which writes no checkpoints."""
    counters: Counters
    rollback: Rollback | None

    @property
    def scheduler(self) -> LRScheduler | None:
        """The learning-rate scheduler of the run; None if it has none."""
        ...

    def restore_counters(self, counters: Counters) -> None:
        """Continue at the counters of a checkpoint."""
        ...


class Checkpointer:
    """Saves and loads the checkpoints of a run. Every rank must call each method.

    Args:
        config: config of the run; provides ``engine.checkpoint``, batch sizes and backend name.
        backend: backend that saves and loads the model and the optimizer.
        identity: settings that must match between this run and a checkpoint that it loads.
        loader: data loader of the run, or None. Its position is saved only if `initialize` built
            it.
    """

    def __init__(
        self,
        config: Config,
        backend: SavedBackend,
        identity: Identity,
        loader: DataLoader[Any] | None,
    ) -> None:
        self.async_saver = AsyncSaver() if config.checkpoint.is_async else None
        self._plan = config.checkpoint
        self._backend_name = config.backend.name
        self._backend = backend
        self._ranks = backend.ranks
        self._identity = identity
        self._loader = loader if isinstance(loader, RunLoader) else None
        self._signals: Signals | None = None
        self._saved_steps = 0  # batches in the last checkpoint of the run

    def resume(self, run: RunState) -> bool:
        """Resume from the newest complete checkpoint if ``engine.checkpoint.resume`` allows it.

        After this call, `save_if_due` also saves if a rank has received SIGINT, SIGTERM or SIGUSR1,
        and the last steps are saved when the process exits. Without ``engine.checkpoint.dir``, this
        method does nothing.

        Returns:
            Whether a checkpoint was loaded.

        Raises:
            FileNotFoundError: if all checkpoints are damaged, or if there is none and
                ``engine.checkpoint.resume`` is "must".
        """
        plan = self._plan
        if plan.dir is None:
            return False
        previous = _USERS.get(str(Path(plan.dir).resolve()))
        if previous is not None:
            atexit.unregister(previous._save_at_exit)  # noqa: SLF001  # the same class
        if plan.every is not None:
            atexit.register(self._save_at_exit, run)
        _USERS[str(Path(plan.dir).resolve())] = self
        # If every checkpoint is damaged, `load` raises: a new run would overwrite them.
        if plan.resume == "never" or (
            plan.resume == "auto" and not storage.has_any_checkpoint(Path(plan.dir))
        ):
            self._signals = self._signals or Signals()
            return False
        checkpoint_dir, _ = self.load(run, Path(plan.dir))
        if self._ranks.rank == 0:
            log.info("resuming from %s at step %d", checkpoint_dir, run.counters.applied_steps)
        self._signals = self._signals or Signals()
        return True

    def save_if_due(self, run: RunState) -> None:
        """Save a checkpoint if one is due, or if any rank has received SIGTERM or SIGUSR1.

        A checkpoint is due every ``engine.checkpoint.every`` batches.

        Raises:
            SystemExit: after the save, if any rank has received SIGTERM or SIGUSR1.
        """
        plan = self._plan
        if plan.dir is None or run.is_trial:
            return
        received = None if self._signals is None else self._signals.find_on_any_rank(self._ranks)
        is_last = received is not None
        is_due = plan.every is not None and run.counters.global_steps % plan.every == 0
        if not (is_due or is_last):
            return
        self._check_directory_is_not_shared(plan.dir)
        self.save(run, Path(plan.dir))
        if is_last:
            self.wait()
            step = run.counters.applied_steps
            log.warning(
                "saved a checkpoint at step %d; exiting because a rank received %s", step, received
            )
            raise SystemExit(INTERRUPTED if received == "SIGINT" else SAVED_AND_ENDED)

    def save_last(self, run: RunState) -> None:
        """Save the last steps of the run, unless they are saved already."""
        plan, is_saved = self._plan, self._saved_steps == run.counters.global_steps
        if plan.dir is None or plan.every is None or run.is_trial or is_saved:
            return
        self._check_directory_is_not_shared(plan.dir)
        self.save(run, Path(plan.dir))
        self.wait()

    def _save_at_exit(self, run: RunState) -> None:
        """Save the last steps of a single process that ends without an exception.

        Several ranks cannot do so: one of them may have left already.
        """
        if self._is_saved(run) or hasattr(sys, "last_value"):
            return
        if self._ranks.world_size > 1:
            if self._ranks.rank == 0:
                log.warning(
                    "the steps after step %d are in no checkpoint; set `engine.max_duration`, or "
                    "call `trainer.save_checkpoint` at the end of the script",
                    self._saved_steps,
                )
            return
        try:
            self.wait()
            self.async_saver = None  # no thread can be started while the process exits
            self.save_last(run)
        except Exception as error:  # noqa: BLE001  # the exit status reports the failure
            exit_with_failure(error)

    def _is_saved(self, run: RunState) -> bool:
        directory = self._plan.dir
        if directory is None or not self._is_only_user(directory):
            return True
        is_deleted = self._saved_steps > 0 and not Path(directory).exists()
        return is_deleted or self._saved_steps == run.counters.global_steps

    def _is_only_user(self, directory: str) -> bool:
        return _USERS.get(str(Path(directory).resolve()), self) is self

    def _check_directory_is_not_shared(self, directory: str) -> None:
        if not self._is_only_user(directory):
            raise MisuseError(
                f"`engine.checkpoint.dir` must be different for each engine of a process, but two "
                f"engines save to {directory}. Give each engine its own directory."
            )

    def save(
        self,
        run: RunState,
        directory: Path,
        tag: str | None = None,
        *,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        frozen: bool = True,
    ) -> None:
        """Write a checkpoint; see `Engine.save_checkpoint`.

        Args:
            run: state of the run to save.
            directory: directory that holds the run's checkpoints.
            tag: name of the checkpoint; default: ``global_stepN`` after N batches.
            client_state: user data to save in the checkpoint: numbers, strings, tensors, and lists
                and mappings of them.
            save_latest: whether a load without a tag may use this checkpoint.
            frozen: whether to include frozen parameters.
        """
        if run.is_trial:
            log.info("no checkpoints are saved during an LR range test")
            return
        ranks, tag = self._ranks, tag or f"global_step{run.counters.global_steps}"
        wait_for_ranks(ranks, f"save_checkpoint({str(directory)!r}, tag={tag!r})")
        check_same_tag(tag, ranks.world_size)
        self.wait()
        partial = directory / f".{tag}.partial"
        with raise_on_all_ranks(ranks.world_size):
            if ranks.rank == 0:
                check_plain_values(client_state or {}, "client_state")
                storage.create_partial(directory, tag)
        with raise_on_all_ranks(ranks.world_size):
            write_values(partial / f"random.{ranks.rank}.pt", get_rng_state())
            if run.rollback is not None:
                run.rollback.save(partial)
            if ranks.rank == 0:
                write_values(partial / _ENGINE, self._collect(run, client_state or {}))
        manifest = Manifest(
            tag=tag,
            step=run.counters.applied_steps,
            world_size=ranks.world_size,
            backend=self._backend_name,
            identity=self._identity,
            versions=storage.collect_versions(),
            resumable=save_latest,
            frozen=frozen,
            created=dt.datetime.now(tz=dt.timezone.utc).isoformat(),
        )
        self._write_backend(partial, manifest)
        self._note_saved(directory, run)

    def _note_saved(self, directory: Path, run: RunState) -> None:
        if self._plan.dir is not None and Path(self._plan.dir) == directory:
            self._saved_steps = run.counters.global_steps

    def _collect(self, run: RunState, client_state: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "lr_scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
            "counters": asdict(run.counters),
            "batch": asdict(run.config.batch),
            "loader": None if self._loader is None else self._loader.state_dict(),
            "client_state": dict(client_state),
        }

    def _write_backend(self, partial: Path, manifest: Manifest) -> None:
        size, saver = self._ranks.world_size, self.async_saver
        if saver is None:
            with raise_on_all_ranks(size):
                self._backend.save(partial, frozen=manifest.frozen)
            with raise_on_all_ranks(size):
                self._commit(partial, manifest)
            return
        with raise_on_all_ranks(size):
            written = self._backend.save_async(
                partial, saver.get_process_group(size), saver.buffers, frozen=manifest.frozen
            )
        saver.commit_after(written, lambda: self._commit(partial, manifest))

    def _commit(self, partial: Path, manifest: Manifest) -> None:
        if self._ranks.rank != 0:
            return
        storage.commit(partial, manifest)
        if self._plan.dir is not None and Path(self._plan.dir) == partial.parent:
            storage.prune(partial.parent, self._plan.keep, self._plan.keep_every)

    def load(
        self,
        run: RunState,
        directory: Path,
        tag: str | None = None,
        *,
        strict: bool = True,
        optimizer: bool = True,
        scheduler: bool = True,
        counters: bool = True,
    ) -> tuple[Path, dict[str, Any]]:
        """Restore a checkpoint; see `Engine.load_checkpoint`.

        Args:
            run: state of the run to restore.
            directory: directory that holds the run's checkpoints.
            tag: name of the checkpoint; default: the newest complete one.
            strict: whether to raise an error if the checkpoint contains parameters or buffers
                that the model does not have.
            optimizer: whether to restore the optimizer, the loss scaler and the RNG states.
            scheduler: whether to restore the scheduler.
            counters: whether to restore the step counters and the position in the training data.

        Returns:
            The checkpoint's directory and its ``client_state``.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            CheckpointError: if the checkpoint is damaged, or does not match the model or the run.
        """
        self.wait()
        checkpoint_dir, manifest = storage.find(directory, tag)
        if optimizer and not self._plan.override:
            check_identity(checkpoint_dir, manifest.identity, self._expected_identity(manifest))
        if not manifest.frozen and self._ranks.rank == 0:
            log.info(
                "%s does not contain the frozen parameters; the model keeps their current values",
                checkpoint_dir,
            )
        state: dict[str, Any] = read_values(checkpoint_dir / _ENGINE)
        own_groups = [_copy_settings(group) for group in self._backend.optimizer.param_groups]
        self._backend.load(
            checkpoint_dir, optimizer=optimizer, strict=strict, frozen=manifest.frozen
        )
        if self._plan.override:  # keep this run's learning rate, betas and weight decay
            for group, settings in zip(
                self._backend.optimizer.param_groups, own_groups, strict=True
            ):
                group.update(settings)
        own = checkpoint_dir / f"random.{self._ranks.rank}.pt"
        if optimizer and own.is_file() and manifest.world_size == self._ranks.world_size:
            set_rng_state(read_values(own))
        if counters:
            self._restore_counters(run, state)
            self._note_saved(directory, run)
        if scheduler and run.scheduler is not None:
            self._restore_scheduler(run, run.scheduler, state)
            if run.rollback is not None:
                run.rollback.load(checkpoint_dir)
        return checkpoint_dir, state["client_state"]

    def _expected_identity(self, manifest: Manifest) -> Identity:
        if not os.environ.get(ELASTIC):
            return self._identity
        # The world size of an elastic run may change; its global batch and schedule may not.
        return {**self._identity, "world_size": manifest.identity.get("world_size")}

    def _restore_counters(self, run: RunState, state: Mapping[str, Any]) -> None:
        """Restore the step counters and the position in the training data.

        If the batch sizes have changed, both are converted to the new batch sizes.
        """
        batch = run.config.batch
        saved = state.get("batch") or asdict(batch)
        counters, position = Counters(**state["counters"]), state["loader"]
        if saved["accumulation"] != batch.accumulation:
            counters.micro_steps = counters.global_steps * batch.accumulation
        if "global_samples" not in state["counters"]:  # written by an older version
            counters.global_samples = counters.global_steps * saved["train"]
        run.restore_counters(counters)
        if self._loader is None or position is None:
            return
        if (saved["accumulation"], saved["train"]) != (batch.accumulation, batch.train):
            samples = position["given"] // saved["accumulation"] * saved["train"]
            position = position | {"given": samples // batch.train * batch.accumulation}
        self._loader.load_state_dict(position)

    def _restore_scheduler(
        self, run: RunState, scheduler: LRScheduler, state: Mapping[str, Any]
    ) -> None:
        saved = state["lr_scheduler"]
        if saved is None or self._plan.override:
            position = convert_position(
                run.counters.applied_steps, run.config, state.get("batch") or {}
            )
            saved = adapt_schedule_state(saved or {}, scheduler.state_dict(), position)
        scheduler.load_state_dict(dict(saved))

    def wait(self) -> None:
        """Wait until the current save has finished on all ranks.

        Raises:
            Exception: if the last save failed on any rank.
        """
        if self.async_saver is not None:
            try:
                with raise_on_all_ranks(self._ranks.world_size):
                    self.async_saver.wait()
            except BaseException:
                self._saved_steps = -1  # unknown
                raise

    def close(self) -> None:
        """Restore the previous signal handlers, and wait for this rank's last save to finish."""
        atexit.unregister(self._save_at_exit)
        if self._signals is not None:
            self._signals.restore_handlers()
        if self.async_saver is not None:
            self.async_saver.close()


def _copy_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the settings of a param group, without what an optimizer counts in it."""
    return {key: value for key, value in group.items() if key not in {"params", "step"}}

"""Save and load the checkpoints of a run."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.checkpoint import storage
from engine.checkpoint.async_saver import AsyncSaver
from engine.checkpoint.collectives import check_same_tag, raise_on_all_ranks, wait_for_ranks
from engine.checkpoint.data_position import DataPosition
from engine.checkpoint.fingerprint import Identity
from engine.checkpoint.lock import DirectoryLock
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.plain_values import check_plain_values, write_values
from engine.checkpoint.restorer import Parts, Restorer
from engine.checkpoint.run_interface import RunState, SavedBackend
from engine.checkpoint.selection import RUN_STATE, CheckpointSelector
from engine.config import Config
from engine.training.optimizers import has_no_optimizer
from engine.training.rng import get_rng_state

__all__ = ["Checkpointer"]

log = logging.getLogger("onecycle")

_TRUST = ", or set `engine.checkpoint.trust_pickle` to true to save it as it is"


class Checkpointer:
    """Manager that saves and loads the checkpoints of a run.

    If one rank calls a method, all other ranks must call it, too.

    Args:
        config: config of the run.
        backend: backend that saves and loads the model and the optimizer.
        identity: settings that must match between this run and a checkpoint that it loads.
    """

    def __init__(self, config: Config, backend: SavedBackend, identity: Identity) -> None:
        self.data = DataPosition(backend.ranks)
        self.async_saver = AsyncSaver() if config.checkpoint.is_async else None
        self._plan = config.checkpoint
        self._backend_name = config.backend.name
        self._backend = backend
        self._ranks = backend.ranks
        self._identity = identity
        self._selector = CheckpointSelector(config, backend.ranks)
        self._restorer = Restorer(config.checkpoint, backend, identity, self.data)
        self._saved: dict[Path, tuple[int, int]] = {}  # steps and last report, by directory
        self._run_id = uuid.uuid4().hex
        self._locks: dict[Path, DirectoryLock | None] = {}  # None on ranks other than 0

    def save(
        self,
        run: RunState,
        directory: str | Path,
        tag: str | None = None,
        *,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        frozen: bool = True,
        is_automatic: bool = False,
    ) -> None:
        """Write a checkpoint; see `Engine.save_checkpoint`.

        Args:
            run: state of the run to save.
            directory: directory that holds the run's checkpoints.
            tag: name of the checkpoint; default: ``global_stepN``, where N is the number of steps.
            client_state: user data to save: plain values, tensors, and containers of these. If
                ``engine.checkpoint.trust_pickle`` is true, objects of other classes, too.
            save_latest: whether `load` may choose this checkpoint if no tag is passed.
            frozen: whether to include frozen parameters.
            is_automatic: whether to mark this checkpoint as automatic, and to delete old automatic
                checkpoints as ``engine.checkpoint.keep`` specifies.
        """
        if run.is_trial:
            log.info("the checkpoint was not saved, because an LR range test is running")
            return
        directory = storage.to_directory(directory)
        ranks, tag = self._ranks, tag or f"global_step{run.counters.global_steps}"
        wait_for_ranks(ranks, f"save_checkpoint({str(directory)!r}, tag={tag!r})")
        check_same_tag(tag, ranks)
        self.wait()
        with raise_on_all_ranks(ranks):
            storage.check_tag(tag)
            if not self._plan.trust_pickle:
                check_plain_values(dict(client_state or {}), "client_state", fix=_TRUST)
        self.lock(directory)
        manifest = Manifest(
            tag=tag,
            step=run.counters.global_steps,
            world_size=ranks.world_size,
            backend=self._backend_name,
            identity=self._identity,
            versions=storage.collect_versions(),
            resumable=save_latest,
            frozen=frozen,
            run=self._run_id,
            is_automatic=is_automatic,
            best=None if run.best is None else run.best.describe(),
            created=dt.datetime.now(tz=dt.UTC).isoformat(),
        )
        try:
            self._write(run, directory / f".{tag}.partial", manifest, client_state or {})
        except BaseException:
            self._discard(directory / f".{tag}.partial")
            raise
        self._saved[directory.resolve()] = _get_position(run)
        run.progress.monitors.note_checkpoint(tag, run.counters.global_steps)

    def lock(self, directory: Path) -> None:
        """Lock a directory, and delete incomplete checkpoints in it. `close` unlocks the directory.

        Raises:
            CheckpointError: if another process has locked the directory.
            OSError: if the directory is not writable.
        """
        if (path := directory.resolve()) in self._locks:
            return
        with contextlib.ExitStack() as stack:
            lock = None
            with raise_on_all_ranks(self._ranks):
                if self._ranks.rank == 0:
                    storage.create_directory(directory)
                    lock = DirectoryLock(directory)
                    stack.callback(lock.release)
                    storage.discard_partials(directory)
            stack.pop_all()  # keep the lock
        self._locks[path] = lock

    def is_saved(self, run: RunState, directory: Path) -> bool:
        """Return whether the run's newest checkpoint in a directory is up to date.

        The checkpoint is up to date if, since the save, the run has neither taken a step nor
        reported the metric that selects the best checkpoint.
        """
        return self._saved.get(directory.resolve(), (0, -1)) == _get_position(run)

    @property
    def is_saving(self) -> bool:
        """Whether a background thread of this rank is still writing a checkpoint."""
        return self.async_saver is not None and self.async_saver.is_saving

    def find_saved_steps(self, directory: Path) -> int:
        """Return the step of this run's newest checkpoint in a directory; 0 if there is none."""
        return max(0, self._saved.get(directory.resolve(), (0, -1))[0])

    def _collect(self, run: RunState, client_state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state to save, except the states of the model and the optimizer.

        Gradients are not saved. A save in the middle of a step therefore stores the counters and
        the data position from the start of the step. A resumed run processes the micro-batches of
        the step again.
        """
        counters, open_batches = run.counters, run.accumulation.micro_batches
        counters = replace(counters, micro_steps=counters.micro_steps - open_batches)
        position = self.data.get_state()
        if position is not None and open_batches:
            # The script may also have passed batches that did not come from the loader.
            position |= {"given": max(0, position["given"] - open_batches), "finished": 0}
        return {
            "lr_scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
            "counters": asdict(counters),
            "monitors": run.progress.monitors.state_dict(),
            "batch": asdict(run.config.batch),
            "loader": position,
            "best": None if run.best is None else run.best.state_dict(),
            "client_state": dict(client_state),
        }

    def _write(
        self, run: RunState, partial: Path, manifest: Manifest, client_state: Mapping[str, Any]
    ) -> None:
        ranks, saver = self._ranks, self.async_saver
        with raise_on_all_ranks(ranks):
            if (lock := self._locks[partial.parent.resolve()]) is not None:
                lock.renew()
                storage.create_partial(partial.parent, manifest.tag)
        with raise_on_all_ranks(ranks):
            write_values(partial / f"random.{ranks.rank}.pt", get_rng_state())
            self.data.save(partial)
            if run.rollback is not None:
                run.rollback.save(partial)
            if ranks.rank == 0:
                state, trusts = self._collect(run, client_state), self._plan.trust_pickle
                write_values(partial / RUN_STATE, state, trusts=trusts)
        if saver is None:
            with raise_on_all_ranks(ranks):
                self._backend.save(partial, frozen=manifest.frozen)
            with raise_on_all_ranks(ranks):
                self._commit(partial, manifest)
            return
        with raise_on_all_ranks(ranks):
            written = self._backend.save_async(
                partial, saver.get_process_group(ranks), saver.buffers, frozen=manifest.frozen
            )
        saver.commit_after(
            written, lambda: self._commit(partial, manifest), lambda: self._discard(partial)
        )

    def _discard(self, partial: Path) -> None:
        if self._ranks.rank == 0:
            storage.discard(partial)

    def _commit(self, partial: Path, manifest: Manifest) -> None:
        if self._ranks.rank != 0:
            return
        storage.commit(partial, manifest)
        if manifest.is_automatic:
            keep, keep_every = self._plan.keep, self._plan.keep_every
            storage.prune(partial.parent, manifest.run, keep, keep_every)

    def load(
        self,
        run: RunState,
        directory: str | Path,
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
            tag: name of the checkpoint; default: the newest complete checkpoint.
            strict: whether the model must have exactly the saved parameters and buffers.
            optimizer: whether to restore the optimizer, the loss scaler and the RNG states.
            scheduler: whether to restore the scheduler.
            counters: whether to restore the step counters and the position in the training data.

        Returns:
            The checkpoint's directory and its ``client_state``.

        Raises:
            FileNotFoundError: if the checkpoint does not exist.
            CheckpointError: if the checkpoint is damaged, or does not match the model or the run.
        """
        directory = storage.to_directory(directory)
        self.wait()
        parts = Parts(optimizer=optimizer, scheduler=scheduler, counters=counters)
        if has_no_optimizer(self._backend.optimizer):  # only the model is used
            parts = Parts(optimizer=False, scheduler=False, counters=False)
        selected = self._selector.select(directory, tag)
        self._restorer.restore(run, selected, parts, strict=strict)
        self._run_id = selected.manifest.run or self._run_id
        if parts.counters:
            self._saved[directory.resolve()] = _get_position(run)
        return selected.path, selected.state["client_state"]

    def wait(self) -> None:
        """Wait until the current save has finished on all ranks.

        Raises:
            Exception: if the save failed on any rank.
        """
        if self.async_saver is not None:
            try:
                with raise_on_all_ranks(self._ranks):
                    self.async_saver.wait()
            except BaseException:
                self._saved = dict.fromkeys(self._saved, (-1, -1))  # unknown
                raise

    def close(self) -> None:
        """Wait for this rank's current save to finish, and unlock the checkpoint directories."""
        try:
            if self.async_saver is not None:
                self.async_saver.close()
        finally:
            for lock in self._locks.values():
                if lock is not None:
                    lock.release()
            self._locks.clear()


def _get_position(run: RunState) -> tuple[int, int]:
    return run.counters.global_steps, -1 if run.best is None else run.best.last_step

"""Saving and restoring a run: the envelope around what a backend and an engine write."""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.backends.base import Backend
from engine.checkpoint import storage
from engine.checkpoint.fingerprint import Identity, refuse_another_run
from engine.checkpoint.plain_values import read_values, refuse_objects, write_values
from engine.checkpoint.rng import load_random_state, random_state
from engine.checkpoint.storage import Manifest
from engine.config import Config
from engine.distributed.environment import ELASTIC
from engine.distributed.ranks import Ranks
from engine.versions import installed
from schedules import FeedbackSchedule, ScheduleBinder
from schedules.feedback.autowu_controller import AutoWUController

__all__ = ["Behind", "Rollback", "load", "save", "together"]

log = logging.getLogger("onecycle")

ENGINE = "engine.pt"

# Ranks come to a save together, unless one does not come at all.
_PATIENCE = dt.timedelta(seconds=30)


def save(
    backend: Backend,
    config: Config,
    identity: Identity,
    folder: Path,
    tag: str,
    step: int,
    state: Mapping[str, Any],
    *,
    save_latest: bool,
    frozen: bool = True,
    behind: Behind | None = None,
    rollback: Rollback | None = None,
) -> Path:
    """Write a whole checkpoint; every rank calls it.

    Args:
        backend: writes model and optimizer.
        config: for what of the run's checkpoints is to be kept.
        identity: what a run that goes on from it must share.
        folder: of all checkpoints of the run.
        tag: name of this one.
        step: updates that were applied.
        state: the engine's own, the same on all ranks but for ``loader``.
        save_latest: whether ``latest`` is to name it.
        frozen: whether parameters that need no gradients are written as well.
        rollback: what a schedule may yet go back to, saved as well.
        behind: what writes it while training goes on; None: training waits.

    Raises:
        RuntimeError: a rank did not come within seconds; the message names it.
        OSError: there is no space, or the folder cannot be written.
        ValueError: the ranks give it different tags, or ``client_state`` holds objects.
    """
    ranks = backend.ranks
    _meet(ranks, f"save_checkpoint({str(folder)!r}, tag={tag!r})")
    _same_tag(tag, ranks.world_size)
    partial = folder / f".{tag}.partial"
    if behind is not None:
        with together(ranks.world_size):
            behind.wait()  # for the one before
    # What needs every rank begins when all are known to be well: a rank would wait there for ever.
    with together(ranks.world_size):
        if ranks.rank == 0:
            refuse_objects(state["client_state"], "client_state")
            storage.begin(folder, tag)
    with together(ranks.world_size):
        write_values(partial / f"random.{ranks.rank}.pt", random_state())
        if rollback is not None:
            rollback.save(partial)
        if ranks.rank == 0:
            write_values(partial / ENGINE, dict(state))
    written: Future[None] | None = None
    with together(ranks.world_size):
        if behind is None:
            backend.save(partial, frozen=frozen)
        else:
            group = behind.group(ranks.world_size)
            written = backend.save_behind(partial, group, behind.arena, frozen=frozen)
    manifest = Manifest(
        tag=tag,
        step=step,
        world_size=ranks.world_size,
        backend=config.backend.name,
        identity=identity,
        versions=_versions(),
        resumable=save_latest,
        frozen=frozen,
        created=dt.datetime.now(tz=dt.timezone.utc).isoformat(),
    )

    def commit() -> None:
        if ranks.rank == 0:
            storage.commit(partial, manifest)
            plan = config.checkpoint
            if plan.dir is not None and Path(plan.dir) == folder:
                storage.prune(folder, plan.keep, plan.keep_every)

    if behind is not None and written is not None:
        behind.follow(written, commit)
        return folder / tag
    with together(ranks.world_size):
        commit()
    return folder / tag


class Rollback:
    """Model and optimizer as they were at the lowest loss of a warmup, for the switch."""

    def __init__(self, config: Config, backend: Backend) -> None:
        schedule = config.schedule
        self._is_wanted = isinstance(schedule, FeedbackSchedule) and schedule.rolls_back
        self._backend = backend
        self._snapshot: Any = None

    def follow(self, scheduler: ScheduleBinder) -> None:
        """Take a copy at each lowest loss, and put the last one back at the switch."""
        if not self._is_wanted:
            return
        controller = scheduler.controller
        if isinstance(controller, AutoWUController) and controller.is_lowest(scheduler.state):
            self._snapshot = self._backend.snapshot()
        if scheduler.just_decided and self._snapshot is not None:
            self._backend.restore(self._snapshot)
            self._snapshot = None
            scheduler.write()
            log.info("model and optimizer are back at the lowest loss of the warmup")

    def save(self, place: Path) -> None:
        """Write this rank's copy, if there is one."""
        if self._snapshot is not None:
            write_values(place / f"rollback.{self._backend.ranks.rank}.pt", self._snapshot)

    def load(self, place: Path) -> None:
        """Read this rank's copy, if there is one and as many ranks as have saved."""
        ranks = self._backend.ranks
        found = len(list(place.glob("rollback.*.pt")))
        whole = found == ranks.world_size
        self._snapshot = read_values(place / f"rollback.{ranks.rank}.pt") if whole else None
        if found and not whole:
            log.warning("another number of ranks has saved: there is nothing to roll back to yet")


class Behind:
    """A checkpoint that is written while training goes on, one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._group: dist.ProcessGroup | None = None
        self.arena: dict[str, Any] = {}
        atexit.register(self._last_wait)

    def group(self, world_size: int) -> dist.ProcessGroup | None:
        """Return a process group of its own: in one with training their messages would mix."""
        if self._group is None and world_size > 1:
            self._group = dist.new_group(backend="gloo")
        return self._group

    def follow(self, written: Future[None], commit: Callable[[], None]) -> None:
        """Commit once all is written."""

        def finish() -> None:
            try:
                written.result()
                commit()
            except Exception as error:  # noqa: BLE001  # raised by the next `wait`
                self._failure = error

        self._thread = threading.Thread(target=finish, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            Exception: what the last checkpoint failed with.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _last_wait(self) -> None:
        """Wait at the end of the process, whose status is to tell of a checkpoint that failed."""
        try:
            self.wait()
        except Exception as error:
            log.critical("the last checkpoint was not written", exc_info=error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def close(self) -> None:
        """Wait, and let go of the copies.

        Raises:
            Exception: what the last checkpoint failed with.
        """
        atexit.unregister(self._last_wait)
        self.wait()
        self.arena.clear()


def load(
    backend: Backend,
    identity: Identity,
    folder: Path,
    tag: str | None,
    *,
    optimizer: bool,
    strict: bool,
    override: bool,
) -> tuple[Path, dict[str, Any]]:
    """Restore model, optimizer and random numbers; return the place and the engine's own state.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: it is not whole, or another run's and ``override`` is not set. Nothing was
            changed then.
    """
    place, manifest = storage.find(folder, tag)
    if optimizer and not override:
        here = dict(identity)
        if os.environ.get(ELASTIC):
            # The batch is the same, and so is the schedule: only the shares of the ranks differ.
            here["world_size"] = manifest.identity.get("world_size")
        refuse_another_run(place, manifest.identity, here)
    if not manifest.frozen and backend.ranks.rank == 0:
        log.info("%s is without frozen parameters; those here stay as they are", place)
    state: dict[str, Any] = read_values(place / ENGINE)
    backend.load(place, optimizer=optimizer, strict=strict, frozen=manifest.frozen)
    own = place / f"random.{backend.ranks.rank}.pt"
    if optimizer and own.is_file() and manifest.world_size == backend.ranks.world_size:
        load_random_state(read_values(own))
    return place, state


def _meet(ranks: Ranks, what: str) -> None:
    """Wait for the other ranks, but not for ever."""
    if ranks.world_size == 1:
        return
    try:
        dist.monitored_barrier(ranks.meeting, timeout=_PATIENCE, wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"every rank must come to {what}, but within {_PATIENCE.seconds} seconds not all did: "
            f"{error}. Call it on all ranks, outside of any `if rank == 0`."
        ) from None


def _same_tag(tag: str, world_size: int) -> None:
    """Refuse ranks that would each write a part of another checkpoint."""
    tags = _gathered(tag, world_size)
    if len(set(tags)) > 1:
        raise ValueError(f"`tag` must be the same on all ranks, but is {tags} instead.")


@contextlib.contextmanager
def together(world_size: int) -> Iterator[None]:
    """Do something on every rank, and raise on all of them what any of them failed with."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  # whatever it is, all have to hear of it
        failure = error
    texts = _gathered(failure and f"{type(failure).__name__}: {failure}", world_size)
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text:
            raise RuntimeError(f"the checkpoint was not written: rank {rank} failed: {text}")


def _gathered(value: Any, world_size: int) -> list[Any]:
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    packages = ("onecycle", "torch", "deepspeed")
    return versions | {name: found for name in packages if (found := installed(name))}

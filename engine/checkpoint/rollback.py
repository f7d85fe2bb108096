"""Restore the weights with the lowest warmup loss, for AutoWU with ``"rollback": true``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from engine.checkpoint.plain_values import read_values, write_values
from engine.distributed.ranks import Ranks
from schedules import ScheduleBinder
from schedules.feedback.autowu_controller import AutoWUController

__all__ = ["Rollback"]

log = logging.getLogger("onecycle")


class RestorableBackend(Protocol):
    """The part of a backend that a rollback needs."""

    @property
    def ranks(self) -> Ranks:
        """Rank and world size of this process."""
        ...

    def snapshot(self) -> Any:
        """Return a copy of everything that training changes."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Restore a snapshot, bit for bit."""
        ...


class Rollback:
    """Keeps a snapshot of the training state at the lowest loss so far.

    The snapshot is restored when AutoWU switches from warmup to decay.
    """

    def __init__(self, backend: RestorableBackend) -> None:
        self._backend = backend
        self._ranks = backend.ranks
        self._snapshot: Any = None

    def update(self, scheduler: object) -> None:
        """Take a snapshot if the last step has the lowest loss so far; restore it at the switch.

        Args:
            scheduler: AutoWU scheduler, after it received the loss of the last step.
        """
        assert isinstance(scheduler, ScheduleBinder)
        assert isinstance(scheduler.controller, AutoWUController)
        if scheduler.controller.is_lowest(scheduler.state):
            self._snapshot = self._backend.snapshot()
        if scheduler.just_decided and self._snapshot is not None:
            self._backend.restore(self._snapshot)
            self._snapshot = None
            scheduler.write()  # restoring also reset the learning rate
            log.info("restored model and optimizer to the lowest loss of the warmup")

    def save(self, checkpoint_dir: Path) -> None:
        """Write this rank's snapshot to a checkpoint, if there is one."""
        if self._snapshot is not None:
            write_values(checkpoint_dir / f"rollback.{self._ranks.rank}.pt", self._snapshot)

    def load(self, checkpoint_dir: Path) -> None:
        """Read this rank's snapshot from a checkpoint, if the same number of ranks saved one."""
        found = len(list(checkpoint_dir.glob("rollback.*.pt")))
        is_complete = found == self._ranks.world_size
        path = checkpoint_dir / f"rollback.{self._ranks.rank}.pt"
        self._snapshot = read_values(path) if is_complete else None
        if found and not is_complete:
            log.warning(
                "%s has rollback snapshots of %d ranks, not %d; ignoring them",
                checkpoint_dir,
                found,
                self._ranks.world_size,
            )

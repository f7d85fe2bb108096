"""Roll back to the lowest loss of the warmup, for AutoWU with ``"rollback": true``."""

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
    """The methods of a backend that `Rollback` calls."""

    @property
    def ranks(self) -> Ranks:
        """Rank and world size of this process."""
        ...

    def snapshot(self) -> Any:
        """Return a copy of model, optimizer and loss scale."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Restore a snapshot exactly."""
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
        """Take a snapshot at the lowest loss so far, or restore it when the decay starts.

        Args:
            scheduler: AutoWU scheduler that has received the loss of the last step.
        """
        assert isinstance(scheduler, ScheduleBinder)
        assert isinstance(scheduler.controller, AutoWUController)
        if scheduler.controller.is_lowest(scheduler.state):
            self._snapshot = self._backend.snapshot()
        if scheduler.just_decided and self._snapshot is not None:
            self._backend.restore(self._snapshot)
            self._snapshot = None
            scheduler.write()  # restoring also reset the learning rate
            log.info("restored the model and the optimizer of the step with the lowest loss")

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
                "ignoring the rollback snapshots in %s: %d ranks saved them, but this run has %d",
                checkpoint_dir,
                found,
                self._ranks.world_size,
            )

"""Implement AutoWU's ``rollback`` parameter.

After the warmup, the model and the optimizer return to their state at the lowest warmup loss.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from engine.checkpoint.plain_values import read_values, report_damage, write_values
from engine.distributed.ranks import Ranks
from schedules import ScheduleBinder
from schedules.feedback.autowu_controller import AutoWUController

__all__ = ["Rollback"]

log = logging.getLogger("onecycle")


class RestorableBackend(Protocol):
    """Protocol for the methods of `engine.backends.base.Backend` that `Rollback` uses."""

    @property
    def ranks(self) -> Ranks:
        """Rank and world size of this process."""
        ...

    def snapshot(self, reuse: Any = None) -> Any:
        """Return a copy of the state of the model, the optimizer and the loss scaler.

        To save memory, the copy may overwrite ``reuse``, an earlier snapshot.
        """
        ...

    def restore(self, snapshot: Any, *, only_check: bool = False) -> None:
        """Restore a snapshot, or if ``only_check`` is true, only check that it fits this run."""
        ...


class Rollback:
    """Manager that rolls back the model, optimizer and loss scaler to their lowest-loss state.

    During the warmup, AutoWU computes the mean loss at regular intervals. `update` takes a snapshot
    whenever this mean is the lowest so far, and restores the latest snapshot when the warmup ends.
    """

    def __init__(self, backend: RestorableBackend) -> None:
        self._backend = backend
        self._ranks = backend.ranks
        self.snapshot: Any = None
        """Latest snapshot; None before the first snapshot and after the warmup."""

    def update(self, scheduler: object) -> None:
        """Take a snapshot at each new lowest mean loss, and restore the latest after the warmup.

        Args:
            scheduler: AutoWU scheduler that has already received the loss of the current step.
        """
        assert isinstance(scheduler, ScheduleBinder)
        assert isinstance(scheduler.controller, AutoWUController)
        if scheduler.controller.is_lowest(scheduler.state):
            self.snapshot = self._backend.snapshot(self.snapshot)
        if scheduler.just_decided and self.snapshot is not None:
            self._backend.restore(self.snapshot)
            self.snapshot = None
            scheduler.write()  # restoring also reset the learning rate
            log.info(
                "rolled back the model and the optimizer to their state at the lowest warmup loss"
            )

    def save(self, checkpoint_dir: Path) -> None:
        """Write this rank's snapshot, if any, to a checkpoint."""
        if self.snapshot is not None:
            write_values(checkpoint_dir / f"rollback.{self._ranks.rank}.pt", self.snapshot)

    def read(self, checkpoint_dir: Path) -> Any:
        """Return this rank's snapshot from a checkpoint, or None if there is none.

        If the snapshots were saved with a different world size, log a warning and return None.

        Raises:
            CheckpointError: if the snapshot is damaged.
        """
        found = len(list(checkpoint_dir.glob("rollback.*.pt")))
        is_complete = found == self._ranks.world_size
        path = checkpoint_dir / f"rollback.{self._ranks.rank}.pt"
        if found and not is_complete:
            log.warning(
                "ignoring the rollback snapshots in %s: they were saved with world size %d, but "
                "this run has world size %d",
                checkpoint_dir,
                found,
                self._ranks.world_size,
            )
        if not is_complete:
            return None
        snapshot = read_values(path)
        with report_damage(path):
            self._backend.restore(snapshot, only_check=True)
        return snapshot

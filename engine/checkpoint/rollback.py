"""Restore the state with the lowest loss of the warmup, for AutoWU with ``"rollback": true``."""

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
    """The part of `engine.backends.base.Backend` that `Rollback` uses."""

    @property
    def ranks(self) -> Ranks:
        """Rank and world size of this process."""
        ...

    def snapshot(self) -> Any:
        """Return a copy of the state of the model, the optimizer and the loss scaler."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Restore a state returned by `snapshot`, bit for bit."""
        ...


class Rollback:
    """Keeps a snapshot of the model, the optimizer and the loss scaler at the lowest loss so far.

    AutoWU compares the mean losses of its test intervals. The snapshot is restored when AutoWU
    switches from warmup to decay.
    """

    def __init__(self, backend: RestorableBackend) -> None:
        self._backend = backend
        self._ranks = backend.ranks
        self._snapshot: Any = None

    def update(self, scheduler: object) -> None:
        """Take a snapshot if the loss is a new minimum; restore the last one when the decay starts.

        Args:
            scheduler: AutoWU scheduler, after it has received the loss of the last step.
        """
        assert isinstance(scheduler, ScheduleBinder)
        assert isinstance(scheduler.controller, AutoWUController)
        if scheduler.controller.is_lowest(scheduler.state):
            self._snapshot = self._backend.snapshot()
        if scheduler.just_decided and self._snapshot is not None:
            self._backend.restore(self._snapshot)
            self._snapshot = None
            scheduler.write()  # restoring also reset the learning rate
            log.info("rolled back the model and the optimizer to the lowest loss of the warmup")

    def save(self, checkpoint_dir: Path) -> None:
        """Write this rank's snapshot to a checkpoint; do nothing if no snapshot was taken."""
        if self._snapshot is not None:
            write_values(checkpoint_dir / f"rollback.{self._ranks.rank}.pt", self._snapshot)

    def load(self, checkpoint_dir: Path) -> None:
        """Load this rank's snapshot from a checkpoint.

        Snapshots that were saved with a different world size are ignored.
        """
        found = len(list(checkpoint_dir.glob("rollback.*.pt")))
        is_complete = found == self._ranks.world_size
        path = checkpoint_dir / f"rollback.{self._ranks.rank}.pt"
        self._snapshot = read_values(path) if is_complete else None
        if found and not is_complete:
            log.warning(
                "ignoring the rollback snapshots in %s: they were saved on %d ranks, "
                "but this run has %d ranks",
                checkpoint_dir,
                found,
                self._ranks.world_size,
            )

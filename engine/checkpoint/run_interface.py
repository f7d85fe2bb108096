"""Protocols for the parts of the run and the backend that the checkpoint code uses."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.checkpoint.rollback import Rollback
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.training.accumulation import Accumulation
from engine.training.best_metric import BestMetric
from engine.training.progress import Counters, ProgressReporter

__all__ = ["RunState", "SavedBackend"]


class SavedBackend(Protocol):
    """Protocol for the methods of `engine.backends.base.Backend` that the checkpoint code uses."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that the schedule controls."""
        ...

    @property
    def ranks(self) -> Ranks:
        """Rank and world size of this process."""
        ...

    def save(self, checkpoint_dir: Path, *, frozen: bool = True) -> None:
        """Save the model, the optimizer and the loss scaler.

        For the arguments, see `engine.backends.base.Backend.save`.
        """
        ...

    def save_async(
        self,
        checkpoint_dir: Path,
        group: dist.ProcessGroup | None,
        buffers: dict[str, Any],
        *,
        frozen: bool = True,
    ) -> Future[None]:
        """Save the same state as `save`, but write the files in the background.

        For the arguments, see `engine.backends.base.Backend.save_async`.

        Returns:
            A future that completes when this rank has written its files.
        """
        ...

    def load(
        self, checkpoint_dir: Path, *, optimizer: bool, strict: bool, frozen: bool = True
    ) -> None:
        """Restore the model and, if ``optimizer`` is true, the optimizer and the loss scaler.

        For the arguments, see `engine.backends.base.Backend.load`.
        """
        ...


class RunState(Protocol):
    """Protocol for a training run whose state is saved in checkpoints."""

    config: Config
    is_trial: bool
    """Whether the run is part of an LR range test. Such a run does not save checkpoints."""
    counters: Counters
    accumulation: Accumulation
    progress: ProgressReporter
    rollback: Rollback | None
    best: BestMetric | None

    @property
    def is_over(self) -> bool:
        """Whether the run has reached its end."""
        ...

    @property
    def scheduler(self) -> LRScheduler | None:
        """The run's learning-rate scheduler, or None if it has none."""
        ...

    def restore_counters(self, counters: Counters) -> None:
        """Restore the counters from a checkpoint, so that the run continues at the saved step."""
        ...

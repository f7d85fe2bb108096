"""Save the position in the training data to a checkpoint, and restore it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.checkpoint.plain_values import read_values, report_damage, write_values
from engine.config.batch_sizes import BatchSizes
from engine.distributed.ranks import Ranks
from engine.errors import MisuseError
from engine.training.loader import RunLoader

__all__ = ["DataPosition"]

log = logging.getLogger("onecycle")


class DataPosition:
    """Position in the training data, saved in checkpoints and restored from them.

    If a checkpoint is loaded before `Engine.prepare` receives the data loader, the position is
    restored during the call to `Engine.prepare`.

    Args:
        ranks: rank and world size of this process.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._loader: RunLoader | None = None
        self._pending: Mapping[str, Any] | None = None
        self._is_checked = False

    def set_loader(self, loader: RunLoader) -> None:
        """Set the run's data loader, and restore the position if a checkpoint was loaded."""
        self._loader = loader
        if self._pending is not None:
            loader.load_state_dict(self._pending)
            self._pending = None

    def get_state(self) -> dict[str, Any] | None:
        """Return the position without this rank's loader state; None if the run has no loader."""
        state = None if self._loader is None else self._loader.state_dict()
        return state and {key: value for key, value in state.items() if key != "loader"}

    def save(self, directory: Path) -> None:
        """Save the state dict of this rank's data loader, if the loader supports state dicts."""
        state = {} if self._loader is None else self._loader.state_dict()
        if "loader" in state:
            write_values(self._get_path(directory), state["loader"])
        if self._loader is not None:
            self._loader.note_save()

    def _get_path(self, directory: Path) -> Path:
        return directory / f"loader.{self._ranks.rank}.pt"

    def read(
        self, state: Mapping[str, Any], batch: BatchSizes, directory: Path, world_size: int
    ) -> Mapping[str, Any] | None:
        """Read the data position from a checkpoint; return None if it was not saved.

        If the batch sizes have changed, the position is converted to batches of the new size.

        Args:
            state: contents of the checkpoint. The key "loader" contains the result of `get_state`.
            batch: batch sizes of this run.
            directory: directory of the checkpoint.
            world_size: number of ranks that saved the checkpoint.

        Raises:
            CheckpointError: if a file is damaged.
        """
        position: dict[str, Any] | None = state["loader"]
        saved = state.get("batch") or asdict(batch)
        if position is None:
            if self._ranks.rank == 0:
                log.warning(
                    "the checkpoint does not contain the position in the data, so training "
                    "starts with the first batch; to save the position, pass the data loader to "
                    "`initialize` as `training_data`, or to `trainer.prepare`"
                )
            return None
        position = position | {"given": max(0, position["given"])}
        if (saved["accumulation"], saved["train"]) != (batch.accumulation, batch.train):
            samples = position["given"] // saved["accumulation"] * saved["train"]
            position = position | {"given": samples // batch.train * batch.accumulation}
        path = self._get_path(directory)
        if path.is_file() and world_size == self._ranks.world_size:
            position = position | {"loader": read_values(path)}
        return position

    @contextlib.contextmanager
    def restore(self, position: Mapping[str, Any] | None, directory: Path) -> Iterator[None]:
        """Restore a position that `read` returned.

        Use this method as a context manager. If the ``with`` block raises an exception, the loader
        returns to its previous position.

        Args:
            position: position in the data; None if the position was not saved.
            directory: directory of the checkpoint, for the error message.

        Raises:
            CheckpointError: if the data loader does not accept the saved state.
        """
        if position is None:
            yield
            return
        pending, loader = self._pending, self._loader
        before = None if loader is None else loader.position
        self._pending = position
        try:
            if loader is not None:
                with report_damage(self._get_path(directory)):
                    self.set_loader(loader)
            yield
        except BaseException:
            self._pending = pending
            if loader is not None and before is not None:
                loader.position = before
            raise

    def check_is_used(self, *, is_required: bool) -> None:
        """On the first step, check that the script uses the run's data loader.

        Also warn if a saved position was loaded but the run has no data loader.

        Args:
            is_required: whether to raise an error instead of logging a warning.

        Raises:
            MisuseError: ``is_required`` is true, and the script does not use the data loader.
        """
        is_first = self._ranks.rank == 0
        if self._pending is not None:
            self._pending = None
            if is_first:
                log.warning(
                    "the position in the data was not restored, because the run has no data "
                    "loader; pass the loader to `initialize` as `training_data`, or to "
                    "`trainer.prepare`"
                )
        if self._loader is None or self._is_checked:
            return
        self._is_checked = True
        if self._loader.is_used:
            return
        if is_required:
            raise MisuseError(
                "This run continues from a checkpoint, but the script does not use the data loader "
                "that `initialize` or `trainer.prepare` returned. A loop over other data would "
                "train for too many epochs. Iterate over this loader."
            )
        if is_first:
            is_shared = self._ranks.world_size > 1
            log.warning(
                "the script does not use the data loader that `initialize` or `trainer.prepare` "
                "returned%s; iterate over this loader, which also resumes at the saved position",
                ", so several ranks may train on the same samples" if is_shared else "",
            )

"""Iterate over the training data: count epochs, save the position, and stop at the run's end."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from engine.distributed.ranks import Ranks
from engine.errors import MisuseError
from engine.training.batch_sampler import GlobalBatchSampler, set_epoch
from engine.training.device_moves import move_to_device
from engine.training.repeats import RepeatCheck
from engine.training.rng import preserve_rng_state

__all__ = ["RunLoader", "has_state"]

log = logging.getLogger("onecycle")

_EMPTY_EPOCHS_BEFORE_WARNING = 2  # the first one is the rest of the last epoch
_MAX_EMPTY_EPOCHS = 10_000
"""Maximum number of loops over the data that a script may start after the end of a run."""


def has_state(loader: object) -> bool:
    """Return whether a data loader has a state dict, like torchdata's StatefulDataLoader."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


class RunLoader:
    """Iterable that yields the micro-batches of a data loader until the run is over.

    Each loop over this object is one epoch, or the rest of an epoch after a resume. Batches are
    moved to the rank's device. Attributes that this class does not define, such as ``dataset``, are
    looked up in the data loader.

    Args:
        batches: data loader of this rank.
        ranks: device, rank and world size of this process.
        seed: seed of ``generator`` in epoch 0; the seed increases by 1 per epoch.
        generator: random generator that was passed to ``batches``. It is seeded at the start of
            each epoch. If None, no generator is seeded.
        sampler: batch sampler of ``batches`` that can skip micro-batches when a run resumes.
            If it is None and the loader has no state dict, the skipped micro-batches are loaded and
            discarded.
        repeats: `RepeatCheck` of the data loader; None to skip the check.
    """

    def __init__(
        self,
        batches: Any,
        ranks: Ranks,
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
        sampler: GlobalBatchSampler | None = None,
        repeats: RepeatCheck | None = None,
    ) -> None:
        self._batches = batches
        self._device = ranks.device
        self._seed = seed
        self._generator = generator
        self._sampler = sampler
        self._repeats = repeats
        self._run_is_over: Callable[[], bool] = lambda: False
        self._end_epoch: Callable[[], None] = lambda: None
        self._on_end: Callable[[], None] = lambda: None
        self._start: Callable[[int], None] = lambda epoch: None
        self.is_used = False
        """Whether the script has iterated over the loader."""
        self._epoch = -1
        self._empty_epochs = 0  # iterations after the end of the run
        self._requested = 0  # micro-batches of this epoch that were requested
        self._is_finished = True  # whether the data of this epoch is used up
        self.resumes = False
        """Whether the next loop over the data continues the current epoch."""
        self._endless: Iterator[Any] | None = None
        self._is_main = ranks.rank == 0
        self._left_epoch: str | None = None  # description of an epoch that was left early
        self._is_saved = False  # whether a checkpoint of this run contains the position

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # `copy` and `pickle` look for special methods
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._batches, name)

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def epoch(self) -> int:
        """Index of the current epoch or, between two epochs, of the next epoch; starts at 0."""
        return self._epoch + 1 if self._is_finished else self._epoch

    @property
    def position(self) -> tuple[int, int, bool, bool, Any]:
        """The position in the training data. Assign a saved position to restore it.

        The position includes the data loader's state dict, if it has one. Before the first epoch,
        the state dict is omitted, because reading it could start the loader's worker processes.
        """
        own = self._batches.state_dict() if has_state(self._batches) and self._epoch >= 0 else None
        return self._epoch, self._requested, self._is_finished, self.resumes, own

    @position.setter
    def position(self, position: tuple[int, int, bool, bool, Any]) -> None:
        self._epoch, self._requested, self._is_finished, self.resumes, own = position
        if own is not None:
            self._batches.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data.

        Returns:
            A dict with the current epoch ("epoch"), the number of micro-batches requested from
            the data loader so far in this epoch ("given"), and whether all data of the epoch has
            been used ("finished"). If the data loader has a state dict, the dict also contains
            this rank's loader state ("loader").
        """
        finished = int(self._is_used_up())
        state = {"epoch": self._epoch, "given": self._requested, "finished": finished}
        return state | {"loader": self._batches.state_dict()} if has_state(self._batches) else state

    def _is_used_up(self) -> bool:
        return self._is_finished or self._has_requested_all()

    def _has_requested_all(self) -> bool:
        return self._sampler is not None and self._requested >= len(self._sampler)

    def load_state_dict(self, state: Mapping[str, Any], *, resumes: bool = True) -> None:
        """Load a saved position, so that the next loop over the data continues from it.

        If ``resumes`` is false or the position is at the end of an epoch, the loop starts a new
        epoch instead.
        """
        self._epoch, self._requested = state["epoch"], state["given"]
        self._endless = self._left_epoch = None
        self._is_finished = bool(state.get("finished")) or self._has_requested_all()
        self.resumes = resumes and not self._is_finished
        if not has_state(self._batches) or not (self.resumes or self._is_finished):
            return
        if "loader" in state:
            self._batches.load_state_dict(state["loader"])
        elif self.resumes:
            log.warning(
                "the checkpoint does not contain the state of this rank's data loader; epoch %d "
                "restarts from the beginning",
                self._epoch,
            )

    def close(self) -> None:
        """Stop the data loader's persistent workers.

        Without this call, they stop only when the loader's iterator is garbage-collected, which can
        delay the exit of this process by several seconds.
        """
        if getattr(self._batches, "persistent_workers", False):
            self._batches._iterator = None  # noqa: SLF001  # torch has no public way

    def call_before_first_epoch(self, start: Callable[[int], None]) -> None:
        """Register a function to call before the first epoch of this process.

        The function receives the index of that epoch.
        """
        self._start = start

    def stop_when(self, run_is_over: Callable[[], bool], end_run: Callable[[], None]) -> None:
        """Stop yielding batches, and call ``end_run``, once ``run_is_over`` returns true."""
        self._run_is_over, self._on_end = run_is_over, end_run

    def call_after_epoch(self, end_epoch: Callable[[], None]) -> None:
        """Register a function to call at the end of each epoch."""
        self._end_epoch = end_epoch

    def __iter__(self) -> Iterator[Any]:
        if self._run_is_over():
            return self._end_run()
        if not self.is_used:
            self._start(self.epoch)
        self.is_used = True
        if not self.resumes:
            self._note_left_epoch()
            self._epoch, self._requested = self._epoch + 1, 0
        self.resumes = self._is_finished = False
        return self._count_requests(self._start_epoch())

    def note_save(self) -> None:
        """Note that a checkpoint contains the position, and warn if a resume would change the run.

        Call this method for each checkpoint of the run. If the script leaves epochs early, as with
        ``itertools.islice``, a resumed run cannot know at which batch the saved epoch ends.
        """
        self._is_saved = True
        self._warn_of_left_epoch()

    def _note_left_epoch(self) -> None:
        is_complete = self._is_used_up() or self._requested >= self._count_batches()
        is_started = self._epoch >= 0 and self._requested > 0
        if is_started and not is_complete and self._left_epoch is None:
            self._left_epoch = f"epoch {self._epoch} after {self._requested} micro-batches"
            self._warn_of_left_epoch()

    def _count_batches(self) -> float:
        try:
            return len(self)
        except (TypeError, NotImplementedError):  # the length of an iterable dataset is optional
            return math.inf

    def _warn_of_left_epoch(self) -> None:
        if not (self._left_epoch and self._is_saved and self._is_main):
            return
        log.warning(
            "the script left %s and started the next one; a resumed run cannot know where the "
            "script leaves an epoch, so it trains on other data and may take more steps; to limit "
            "the run, set `engine.max_duration` in steps and loop over `trainer.batches()`",
            self._left_epoch,
        )
        self._is_main = False  # warn only once

    def iterate_forever(self) -> Iterator[Any]:
        """Return an infinite iterator that starts the next epoch whenever an epoch ends."""
        if self._endless is None:
            self._endless = itertools.chain.from_iterable(itertools.repeat(self))
        return self._endless

    def _start_epoch(self) -> Iterator[Any]:
        """Return an iterator over the rest of the current epoch."""
        set_epoch(self._batches, self._epoch)
        set_epoch(getattr(self._batches, "dataset", None), self._epoch)
        if self._generator is not None:
            self._generator.manual_seed(self._seed + self._epoch)
        if self._sampler is not None:
            self._sampler.epoch, self._sampler.skips = self._epoch, self._requested
        batches: Iterator[Any] = iter(self._batches)
        is_replayed = self._sampler is None and not has_state(self._batches)
        if is_replayed and self._requested:
            with preserve_rng_state():  # the restored state is the one after these batches
                next(itertools.islice(batches, self._requested - 1, None), None)
        return batches

    def _count_requests(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._repeats is not None and not self._repeats.add(batch):
                self._repeats = None
            self._requested += 1
            yield self._move(batch)
            if self._run_is_over():
                self._is_finished = self._is_used_up()
                yield from self._end_run()
                return
        self._is_finished = True
        self._end_epoch()
        if self._run_is_over():
            yield from self._end_run()

    def _move(self, batch: Any) -> Any:
        if self._device.type == "cpu":
            return batch
        return move_to_device(batch, self._device)

    def _end_run(self) -> Iterator[Any]:
        self._empty_epochs += 1
        if self._empty_epochs > _MAX_EMPTY_EPOCHS:
            raise MisuseError(
                "The run is over, but the training loop keeps requesting batches. Exit the loop "
                "when `trainer.run_is_over` is true, or increase `engine.max_duration`."
            )
        self._on_end()
        if self._empty_epochs == _EMPTY_EPOCHS_BEFORE_WARNING and self._is_main:
            log.warning(
                "the run is over, so this epoch has no batches; exit the loop over the epochs when "
                "`trainer.run_is_over` is true"
            )
        return iter(())

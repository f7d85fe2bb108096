"""The data loader of ``initialize``; its global batches do not depend on the world size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.errors import MisuseError

__all__ = [
    "GlobalBatchSampler",
    "RunLoader",
    "call_model",
    "call_on_batches",
    "count_steps_per_epoch",
    "make_loader",
    "read_epoch",
]


_MAX_EMPTY_EPOCHS = 10_000
"""Iterations of a loader after the end of a run; more of them are an endless loop."""


def call_model(model: Callable[..., Any], batch: Any) -> Any:
    """Call a model on a batch; a tuple, list or mapping is unpacked into its arguments.

    >>> call_model(max, (1, 3)), call_model(dict, {"x": 2})
    (3, {'x': 2})
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def call_on_batches(model: Callable[..., Any], batches: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield the model's output for each of the next ``count`` batches.

    Raises:
        ValueError: the iterator has fewer than ``count`` batches left.
    """
    for index in range(count):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"`data_iter` must yield {count} micro-batches, got {index}. Make it endless, or "
                "stop at the end of an epoch."
            )
        yield call_model(model, batch)


class GlobalBatchSampler(Sampler[list[int]]):
    """Samples one rank's micro-batches, so that global batches do not depend on the world size.

    Each epoch is a random permutation of the dataset, cut into batches of ``train_batch_size``.
    Each batch is split across ranks and micro-batches. Step k therefore trains on the same samples
    whether a batch of 8 is processed on one rank, in 2 micro-batches of 4, or on two ranks with 4
    samples each. The last batch is filled up with samples from the start of the permutation, or
    dropped. Each iteration over the sampler is one epoch and uses a new permutation.

    Args:
        samples: number of samples in the dataset, at least 1.
        config: config with the batch sizes, ``dataloader_drop_last`` and the seed.
        rank: rank whose micro-batches are yielded.

    Raises:
        ValueError: the dataset is empty, or ``dataloader_drop_last`` drops its only batch.
    """

    def __init__(self, samples: int, config: Config, rank: int) -> None:
        self._samples = samples
        self._sizes = config.batch
        self._rank = rank
        self._seed = config.data.seed
        self.epoch = 0
        self.skips = 0
        whole = samples // config.batch.train
        self.batches = whole if config.data.drop_last else math.ceil(samples / config.batch.train)
        if self.batches == 0:
            fix = (
                'Set "dataloader_drop_last": false, or a smaller "train_batch_size".'
                if samples
                else "Check how the dataset is built."
            )
            minimum = config.batch.train if samples else 1
            raise ValueError(f"`len(training_data)` must be >= {minimum}, got {samples}. {fix}")

    def __len__(self) -> int:
        return self.batches * self._sizes.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        self.epoch += 1
        order = torch.randperm(self._samples, generator=generator).tolist()
        sizes = self._sizes
        wanted = self.batches * sizes.train
        order = (order * math.ceil(wanted / self._samples))[:wanted]
        stride = sizes.micro * sizes.world_size
        skips, self.skips = self.skips, 0
        for start in range((skips * sizes.world_size + self._rank) * sizes.micro, wanted, stride):
            yield order[start : start + sizes.micro]


class RunLoader(DataLoader[Any]):
    """Data loader that stops when the run is over, even in the middle of an epoch."""

    _run_is_over: Callable[[], bool] | None = None
    _end_epoch: Callable[[], None] | None = None
    _save_last: Callable[[], None] | None = None
    _check_resume: Callable[[], None] | None = None
    _seed = 0
    _epoch = -1
    _empty_epochs = 0  # iterations after the end of the run
    _requested = 0  # micro-batches of this epoch that were requested
    _is_finished = True  # whether the data of this epoch is used up
    resumes = False
    """Whether the next iteration resumes the current epoch instead of starting a new one."""

    @property
    def epoch(self) -> int:
        """The epoch that is being iterated over or, between epochs, the next one; from 0."""
        return self._epoch + 1 if self._is_finished else self._epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the micro-batches requested in it, and whether its data is used up."""
        finished = int(self._is_used_up())
        return {"epoch": self._epoch, "given": self._requested, "finished": finished}

    def _is_used_up(self) -> bool:
        return self._is_finished or self._requested == self._count_micro_batches()

    def load_state_dict(self, state: Mapping[str, int], *, resumes: bool = True) -> None:
        """Load a saved position; if ``resumes`` is false, start with the next epoch instead.

        If the data of the saved epoch is used up, the next iteration starts the next epoch.
        """
        self._epoch, self._requested = state["epoch"], state["given"]
        finished = self._requested == self._count_micro_batches()  # written by older versions
        self._is_finished = bool(state.get("finished", finished))
        self.resumes = resumes and not self._is_finished

    def _count_micro_batches(self) -> int | None:
        return None if isinstance(self.dataset, IterableDataset) else len(self)

    def check_before_resuming(self, check_resume: Callable[[], None]) -> None:
        """Call ``check_resume`` before the first iteration after an automatic resume."""
        self._check_resume = check_resume

    def set_seed(self, seed: int) -> None:
        """Set the seed of the workers' random number generators."""
        self._seed = seed

    def stop_when(self, run_is_over: Callable[[], bool], save_last: Callable[[], None]) -> None:
        """Stop iterating once ``run_is_over`` returns true, and then call ``save_last``."""
        self._run_is_over, self._save_last = run_is_over, save_last

    def call_after_epoch(self, end_epoch: Callable[[], None]) -> None:
        """Call ``end_epoch`` whenever the data of an epoch is used up."""
        self._end_epoch = end_epoch

    def __iter__(self) -> Any:
        if self._run_is_over is not None and self._run_is_over():
            return self._end_run()
        check, self._check_resume = self._check_resume, None
        if check is not None:
            check()
        if not self.resumes:
            self._epoch, self._requested = self._epoch + 1, 0
        self.resumes = self._is_finished = False
        if self.generator is not None:
            # Worker seeds come from this generator, which leaves the global random state unchanged.
            self.generator.manual_seed(self._seed + self._epoch)
        sampler = self.batch_sampler
        skips = self._requested
        if isinstance(sampler, GlobalBatchSampler):
            sampler.epoch, sampler.skips = self._epoch, skips  # skipping loads no samples
            return self._count_requests(super().__iter__())
        return self._count_requests(itertools.islice(super().__iter__(), skips, None))

    def _count_requests(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._requested += 1
            yield batch
            if self._run_is_over is not None and self._run_is_over():
                self._is_finished = self._is_used_up()
                yield from self._end_run()
                return
        self._is_finished = True
        if self._end_epoch is not None:
            self._end_epoch()
        if self._run_is_over is not None and self._run_is_over():
            yield from self._end_run()

    def _end_run(self) -> Iterator[Any]:
        self._empty_epochs += 1
        if self._empty_epochs > _MAX_EMPTY_EPOCHS:
            raise MisuseError(
                "The run is over, but the training loop continues to iterate over the data. Exit "
                "the loop when `trainer.run_is_over` is true, or increase `engine.max_duration`."
            )
        if self._save_last is not None:
            self._save_last()
        return iter(())


def read_epoch(loader: DataLoader[Any] | None) -> int:
    """Return the epoch of the loader that `initialize` built.

    Raises:
        RuntimeError: `initialize` did not build a loader.
    """
    if not isinstance(loader, RunLoader):
        raise MisuseError("`epoch` is unknown. Pass `training_data` to `initialize`.")
    return loader.epoch


def count_steps_per_epoch(loader: DataLoader[Any] | None, config: Config) -> float | None:
    """Return the number of optimizer steps per pass over the data; None if it is unknown."""
    if loader is None or isinstance(loader.dataset, IterableDataset):
        return None
    return len(loader) / config.batch.accumulation


def make_loader(
    dataset: Dataset[Any],
    config: Config,
    ranks: Ranks,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> RunLoader:
    """Build the data loader of one rank; it yields micro-batches and reshuffles every epoch.

    An iterable dataset is not shuffled, and must split its samples across ranks itself.

    Raises:
        ValueError: the dataset is empty, or ``dataloader_drop_last`` drops its only batch.
    """
    settings: dict[str, Any] = {
        "collate_fn": collate_fn,
        "pin_memory": ranks.device.type == "cuda",
        "generator": torch.Generator(),
    }
    if isinstance(dataset, IterableDataset):
        settings |= {"batch_size": config.batch.micro, "drop_last": config.data.drop_last}
    else:
        settings["batch_sampler"] = GlobalBatchSampler(len(dataset), config, ranks.rank)  # type: ignore[arg-type]  # Dataset does not declare __len__
    loader = RunLoader(dataset, **settings)
    loader.set_seed(config.data.seed)
    return loader

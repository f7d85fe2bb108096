"""The loader that ``initialize`` makes from a dataset: the same batches on any number of ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from engine.config import Config
from engine.distributed.ranks import Ranks

__all__ = ["GlobalBatchSampler", "RunLoader", "call_on_batches", "called_on", "make_loader"]


def called_on(model: Callable[..., Any], batch: Any) -> Any:
    """Return what a model makes of a batch; tuples, lists and mappings become its arguments.

    >>> called_on(max, (1, 3)), called_on(dict, {"x": 2})
    (3, {'x': 2})
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def call_on_batches(model: Callable[..., Any], batches: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield what a model returns for each of the next batches.

    Raises:
        ValueError: there are fewer than ``count``.
    """
    for _ in range(count):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"`data_iter` must give {count} micro-batches, but ended before; make it endless, "
                "or stop at the end of an epoch."
            )
        yield called_on(model, batch)


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields one rank's micro-batches so that each optimizer update sees a whole global batch.

    An epoch is a permutation cut into batches of ``train_batch_size``, which the ranks and the
    accumulation steps share out. So update k sees the same samples whether a batch of 8 is 8 on
    one rank, 2 x 4 accumulated, or 4 on each of two ranks. The last batch is filled up from the
    beginning of the permutation, or left out. Each iteration is an epoch in an order of its own.

    Args:
        samples: number of samples in the dataset, 1 or more.
        config: for the batch sizes, ``dataloader_drop_last`` and the seed.
        rank: which rank's share this is.

    Raises:
        ValueError: there are no samples, or all would be left out.
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
            cure = (
                'set "dataloader_drop_last": false, or a smaller "train_batch_size"'
                if samples
                else "check how the dataset is made"
            )
            raise ValueError(
                f"`training_data` must hold at least {config.batch.train if samples else 1} "
                f"samples, but holds {samples} instead; {cure}."
            )

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
        for begin in range((skips * sizes.world_size + self._rank) * sizes.micro, wanted, stride):
            yield order[begin : begin + sizes.micro]


class RunLoader(DataLoader[Any]):
    """A loader that ends where the run does, in the midst of an epoch and in all later ones."""

    _run_is_over: Callable[[], bool] | None = None
    _seed = 0
    _epoch = -1
    _given = 0  # micro-batches of the epoch, counted when they are asked for
    resumes = False
    """Whether the next iteration goes on in the midst of its epoch instead of beginning one."""

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its micro-batches were given."""
        return {"epoch": self._epoch, "given": self._given}

    def load_state_dict(self, state: dict[str, int], *, resumes: bool = True) -> None:
        """Let the next iteration go on where the state was returned, or begin the epoch after."""
        self._epoch, self._given, self.resumes = state["epoch"], state["given"], resumes

    def begin(self, seed: int) -> None:
        """Take the seed of the run."""
        self._seed = seed

    def end_with(self, run_is_over: Callable[[], bool]) -> None:
        """Take the function that says whether the run has made all of its updates."""
        self._run_is_over = run_is_over

    def __iter__(self) -> Any:
        if self._run_is_over is not None and self._run_is_over():
            return iter(())
        if not self.resumes:
            self._epoch, self._given = self._epoch + 1, 0
        self.resumes = False
        if self.generator is not None:
            # Workers' seeds come from here, not from the generator that the script draws from.
            self.generator.manual_seed(self._seed + self._epoch)
        sampler = self.batch_sampler
        skips = self._given
        if isinstance(sampler, GlobalBatchSampler):
            sampler.epoch, sampler.skips = self._epoch, skips  # nothing is loaded to be left out
            return self._counted(super().__iter__())
        return self._counted(itertools.islice(super().__iter__(), skips, None))

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._given += 1
            yield batch
            if self._run_is_over is not None and self._run_is_over():
                return


def make_loader(
    dataset: Dataset[Any],
    config: Config,
    ranks: Ranks,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> RunLoader:
    """Return the loader of a dataset: one rank's micro-batches, shuffled anew in each epoch.

    An iterable dataset is batched in its own order; sharing it out among ranks is its own business.

    Raises:
        ValueError: the dataset is empty, or smaller than the one batch that it is to fill.
    """
    settings: dict[str, Any] = {
        "collate_fn": collate_fn,
        "pin_memory": ranks.device.type == "cuda",
        "generator": torch.Generator(),
    }
    if isinstance(dataset, IterableDataset):
        settings |= {"batch_size": config.batch.micro, "drop_last": config.data.drop_last}
    else:
        settings["batch_sampler"] = GlobalBatchSampler(len(dataset), config, ranks.rank)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
    loader = RunLoader(dataset, **settings)
    loader.begin(config.data.seed)
    return loader

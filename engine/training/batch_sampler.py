"""Sample the micro-batches of one rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler, get_worker_info

from engine.config import Config
from engine.training.rng import preserve_rng_state, seed_rng

__all__ = [
    "EpochOrder",
    "GlobalBatchSampler",
    "find_samplers",
    "order_dataset",
    "order_sampler",
    "set_epoch",
]


@dataclass(frozen=True)
class EpochOrder:
    """The order in which each epoch visits the data."""

    name: str
    """Name of ``length`` in error messages, such as ``len(training_data)``."""
    draw: Callable[[int], Sequence[Any]]
    """Function that takes the index of an epoch and returns the items of that epoch.

    Calls with the same index return the same items.
    """
    length: int
    """Number of items per epoch."""
    drop_last: bool
    """Whether an incomplete last batch of an epoch is dropped."""
    is_batched: bool = False
    """Whether each item is a micro-batch of one rank. If false, each item is a sample."""
    is_sharded: bool = False
    """Whether the items are sharded across ranks. If false, all ranks have the same items."""


def order_dataset(samples: int, config: Config) -> EpochOrder:
    """Return the order in which each epoch visits the samples of a dataset.

    If shuffling is enabled, the order is a new random permutation in each epoch.

    Args:
        samples: number of samples in the dataset.
        config: config with the seed, ``engine.dataloader.shuffle`` and ``dataloader_drop_last``.
    """

    def draw(epoch: int) -> Sequence[int]:
        if not config.data.shuffle:
            return range(samples)
        generator = torch.Generator().manual_seed(config.data.seed + epoch)
        return torch.randperm(samples, generator=generator).tolist()

    return EpochOrder("len(training_data)", draw, samples, config.data.drop_last)


def order_sampler(source: Any, config: Config, **settings: Any) -> EpochOrder:
    """Return the order in which each epoch visits the items of a sampler.

    Before the items of an epoch are drawn, the global random generators and the sampler's
    generators are seeded with ``engine.seed`` and the epoch's index. Afterward, their previous
    states are restored.

    Args:
        source: sampler or batch sampler with a length.
        config: config with the seed.
        **settings: other fields of `EpochOrder`.
    """
    samplers = find_samplers(source)
    generators = [getattr(each, "generator", None) for each in samplers]
    own = [each for each in generators if isinstance(each, torch.Generator)]

    def draw(epoch: int) -> Sequence[Any]:
        set_epoch(source, epoch)
        states = [generator.get_state() for generator in own]
        with preserve_rng_state():
            seed_rng(f"{config.data.seed} {epoch}")
            for generator in own:
                generator.manual_seed(config.data.seed + epoch)
            items = list(itertools.islice(source, len(source)))
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)
        return items

    return EpochOrder(draw=draw, **settings)


def find_samplers(source: Any) -> list[Any]:
    """Return ``source`` and all samplers nested in it, outermost first."""
    found: list[Any] = []
    while source is not None and not any(source is each for each in found):
        found.append(source)
        inner = (getattr(source, name, None) for name in ("batch_sampler", "sampler"))
        source = next((each for each in inner if each is not None), None)
    return found


def set_epoch(source: Any, epoch: int) -> None:
    """Call ``set_epoch`` on ``source`` and on its nested samplers, if they have this method."""
    for each in find_samplers(source):
        if callable(getattr(each, "set_epoch", None)):
            each.set_epoch(epoch)


class GlobalBatchSampler(Sampler[Any]):
    """Sampler that splits global batches into micro-batches and yields those of one rank.

    Each epoch consists of global batches of ``train_batch_size`` samples. Each batch is split
    across ranks and micro-batches. Step k therefore trains on the same samples for any number of
    ranks. For example, one rank can process a batch of 8 in 2 micro-batches of 4, or two ranks can
    process 4 samples each. If ``order.drop_last`` is true, an incomplete last batch is dropped.
    Otherwise, it is filled with samples from the start of the epoch. Each iteration over the
    sampler is one epoch.

    Args:
        order: order in which each epoch visits the data.
        config: config with the batch sizes and the seed.
        rank: rank whose micro-batches are yielded.
        seeds_workers: whether each micro-batch seeds the worker process that loads it.

    Raises:
        ValueError: the data is empty, or the only batch is incomplete and would be dropped.
    """

    def __init__(
        self, order: EpochOrder, config: Config, rank: int, *, seeds_workers: bool = False
    ) -> None:
        self._order = order
        self._seed = f"{config.data.seed} {rank if order.is_sharded else ''}"
        self._seeds_workers = seeds_workers
        self.epoch = 0
        self.skips = 0
        """Number of micro-batches that the next iterator skips, without loading their samples."""
        ranks = 1 if order.is_sharded else config.batch.data_ranks
        self._micro = 1 if order.is_batched else config.batch.micro
        self._stride = self._micro * ranks
        self._rank = 0 if order.is_sharded else rank
        self._accumulation = config.batch.accumulation
        train = self._stride * self._accumulation
        self.batches = order.length // train if order.drop_last else math.ceil(order.length / train)
        if self.batches == 0:
            fix = (
                'Set "dataloader_drop_last": false, or `drop_last=False` in your own data loader. '
                'Alternatively, reduce "train_batch_size".'
                if order.length
                else "Check how the dataset is built."
            )
            minimum = train if order.length else 1
            raise ValueError(f"`{order.name}` must be >= {minimum}, got {order.length}. {fix}")

    def __len__(self) -> int:
        return self.batches * self._accumulation

    def __iter__(self) -> Iterator[Any]:
        epoch, skips = self.epoch, self.skips
        self.epoch, self.skips = epoch + 1, 0
        order = list(self._order.draw(epoch))
        wanted = len(self) * self._stride
        order = (order * math.ceil(wanted / len(order)))[:wanted]
        first = skips * self._stride + self._rank * self._micro
        for start in range(first, wanted, self._stride):
            items = order[start] if self._order.is_batched else order[start : start + self._micro]
            if self._seeds_workers:
                yield _SeededItems(items, f"{self._seed} {epoch} {start // self._micro}")
            else:
                yield items


class _SeededItems:
    """Items of one micro-batch, with a seed for the worker process.

    The worker is seeded when it unpickles the items, so that a resumed run draws the same random
    numbers as the original run.
    """

    def __init__(self, items: Any, seed: str) -> None:
        self._items, self._seed = items, seed

    def __reduce__(self) -> tuple[Callable[[Any, str], Any], tuple[Any, str]]:
        return _seed_worker, (self._items, self._seed)


def _seed_worker(items: Any, seed: str) -> Any:
    if get_worker_info() is not None:
        seed_rng(seed)
    return items

"""Build the data loader of a run, and call a model on its batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from engine.config import Config
from engine.distributed.ranks import Ranks, gather_if_different
from engine.errors import MisuseError
from engine.training.batch_sampler import order_dataset
from engine.training.loader import RunLoader
from engine.training.own_loaders import build_run_loader, is_loader, prepare_loader

__all__ = [
    "build_loader",
    "call_model",
    "call_on_batches",
    "count_steps_per_epoch",
    "make_rank_loader",
    "read_epoch",
    "repeat_batches",
]


def call_model(model: Callable[..., Any], batch: Any) -> Any:
    """Call a model on a batch, unpacking a tuple, list or mapping into arguments.

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
                f"`data_iter` must yield {count} micro-batches per step, got {index}. Pass an "
                "infinite iterator, or stop training at the end of an epoch."
            )
        yield call_model(model, batch)


def repeat_batches(loader: RunLoader | None) -> Iterator[Any]:
    """Return an infinite iterator over the batches of the run's data loader.

    Raises:
        RuntimeError: the run has no data loader.
    """
    if loader is None:
        raise MisuseError(
            "`train_batch()` requires training data. Pass an iterator over micro-batches, or "
            "pass `training_data` to `initialize`."
        )
    return loader.iterate_forever()


def read_epoch(loader: RunLoader | None) -> int:
    """Return the current epoch of the run's data loader.

    Raises:
        RuntimeError: the run has no data loader.
    """
    if loader is None:
        raise MisuseError(
            "`trainer.epoch` is unknown, because the run has no data loader. Pass `training_data` "
            "to `initialize`, or your data loader to `trainer.prepare`."
        )
    return loader.epoch


def count_steps_per_epoch(loader: RunLoader | None, config: Config, ranks: Ranks) -> int | None:
    """Return the number of optimizer steps per epoch. It is the same on all ranks.

    If the loaders of the ranks have different lengths, the shortest one counts. The result is None
    if no rank has a loader of a known length. Every rank must call this function.

    Raises:
        ValueError: an epoch has fewer micro-batches than one optimizer step requires.
    """
    own = None
    # An iterable dataset may have no length.
    with contextlib.suppress(TypeError, NotImplementedError):
        own = None if loader is None else len(loader)
    lengths = [each for each in gather_if_different(ranks, own) or [own] if each is not None]
    if not lengths:
        return None
    micro_batches: int = min(lengths)
    # If the data ends in the middle of a step, the gradients of this step are discarded.
    steps = micro_batches // config.batch.accumulation
    if steps == 0:
        raise ValueError(
            "The number of micro-batches per epoch must be >= `gradient_accumulation_steps` "
            f"({config.batch.accumulation}), got {micro_batches}. Reduce `train_batch_size`."
        )
    return steps


def build_loader(
    training_data: Any,
    config: Config,
    ranks: Ranks,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> RunLoader:
    """Build the data loader that yields the micro-batches of one rank.

    A map-style dataset is shuffled in every epoch, unless the config disables shuffling. An
    iterable dataset is not shuffled and must split its samples across ranks.

    Args:
        training_data: dataset, or the user's own data loader.
        config: config with the batch sizes, the seed and ``engine.dataloader``.
        ranks: device, rank and world size of this process.
        collate_fn: function that turns a list of samples of the dataset into a batch.

    Raises:
        ValueError: a map-style dataset yields no batch, ``collate_fn`` or a key of
            ``engine.dataloader`` does not apply to ``training_data``, or the data loader does not
            fit the config or the ranks.
    """
    if is_loader(training_data):
        if collate_fn is not None:
            raise ValueError(
                "`collate_fn` applies only to a dataset, but `training_data` is a data loader. "
                "Pass `collate_fn` to the data loader instead."
            )
        return prepare_loader(training_data, config, ranks)
    data = config.data
    settings: dict[str, Any] = {
        "collate_fn": collate_fn,
        "num_workers": data.num_workers,
        "prefetch_factor": data.prefetch_factor,
        "persistent_workers": data.persistent_workers,
        "pin_memory": data.pin_memory and ranks.device.type == "cuda",  # torch warns on the CPU
    }
    if not isinstance(training_data, IterableDataset):
        check_has_length(training_data)
        order = order_dataset(len(training_data), config)
        return build_run_loader(training_data, settings, order, config, ranks)
    if config.raw.get("engine", {}).get("dataloader", {}).get("shuffle"):
        raise ValueError(
            "`engine.dataloader.shuffle` has no effect on an iterable dataset. Shuffle in the "
            "dataset, and remove the key."
        )
    settings |= {"batch_size": config.batch.micro, "drop_last": data.drop_last}
    return build_run_loader(training_data, settings, None, config, ranks)


def check_has_length(training_data: Any) -> None:
    """Check that a dataset is map-style: it has a length and returns the sample of an index."""
    for name in ("__len__", "__getitem__"):
        if not hasattr(training_data, name):
            raise ValueError(
                f"`training_data` must have `{name}`, got a value of type "
                f"{type(training_data).__name__}. Pass a Dataset, a DataLoader or a list. To read "
                "from a generator, yield the samples in the `__iter__` method of an "
                "IterableDataset."
            )


def make_rank_loader(
    dataset: Dataset[Any],
    ranks: Ranks,
    *,
    shuffle: bool,
    sampler: Sampler[Any] | None = None,
    pin_memory: bool = True,
    **settings: Any,
) -> DataLoader[Any]:
    """Build a data loader for one rank.

    Checkpoints do not store the position of this loader.

    Args:
        dataset: dataset to load. An iterable dataset must split its samples across ranks.
        ranks: rank, world size and device of this process.
        shuffle: whether to shuffle a map-style dataset. Ignored if ``sampler`` is given.
        sampler: sampler for this rank; None to split a map-style dataset across ranks.
        pin_memory: whether to copy batches to pinned memory. Ignored if the rank uses no GPU.
        **settings: other arguments of `DataLoader`.
    """
    if sampler is None and not isinstance(dataset, IterableDataset):
        sampler = DistributedSampler(dataset, ranks.data_ranks, ranks.data_rank, shuffle=shuffle)
    is_pinned = pin_memory and ranks.device.type == "cuda"
    return DataLoader(dataset, sampler=sampler, pin_memory=is_pinned, **settings)

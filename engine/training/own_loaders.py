"""Prepare the user's own data loader for a run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from engine.config import Config
from engine.distributed.ranks import Ranks, gather_if_different
from engine.training.batch_sampler import (
    EpochOrder,
    GlobalBatchSampler,
    find_samplers,
    order_sampler,
)
from engine.training.loader import RunLoader, has_state
from engine.training.repeats import RepeatCheck

__all__ = ["build_run_loader", "is_loader", "prepare_loader"]

log = logging.getLogger("onecycle")

_SETTINGS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)
"""Arguments of torch's DataLoader that do not affect which samples it loads."""


def is_loader(value: object) -> bool:
    """Return whether a value is a data loader rather than a dataset."""
    if isinstance(value, Dataset) or hasattr(value, "__getitem__"):
        return False
    return isinstance(value, DataLoader) or (isinstance(value, Iterable) and has_state(value))


def prepare_loader(loader: Iterable[Any], config: Config, ranks: Ranks) -> RunLoader:
    """Prepare a data loader for a run. Every rank must call this function.

    A `torch.utils.data.DataLoader` is normally replaced with a new one that has the same dataset
    and settings. The new loader splits the samples across the ranks in a reproducible order; an
    iterable dataset must split its samples itself. A loader that has a ``state_dict`` method, or
    whose class overrides how batches are yielded, is used unchanged and must split its samples
    across the ranks itself.

    Args:
        loader: data loader that yields micro-batches.
        config: config with the batch sizes and the seed.
        ranks: device, rank and world size of this process.

    Raises:
        ValueError: ``loader`` is not a data loader, conflicts with the config, or does not split
            its samples correctly across the ranks.
    """
    if not is_loader(loader):
        raise ValueError(
            "`loader` must be a torch DataLoader, or a loader with `state_dict` and "
            f"`load_state_dict`, got {type(loader).__name__}. Wrap it in a DataLoader, or pass a "
            "dataset as `training_data` to `initialize`."
        )
    _check_settings(loader, config)
    if not isinstance(loader, DataLoader) or has_state(loader) or _overrides_iteration(loader):
        prepared, description = _use_loader(loader, config, ranks), "is used unchanged"
    else:
        prepared, description = _rebuild_loader(loader, config, ranks)
    if ranks.rank == 0:
        log.info("the data loader %s", description)
    return prepared


def _check_settings(loader: Any, config: Config) -> None:
    section = config.raw.get("engine", {}).get("dataloader")
    if section:
        raise ValueError(
            "`engine.dataloader` applies only to a dataset, but the script passes its own data "
            f"loader ({type(loader).__name__}). Remove `engine.dataloader`, or pass a dataset."
        )
    size, micro = _read_batch_size(loader), config.batch.micro
    if size not in {None, micro}:
        own = f'"train_micro_batch_size_per_gpu": {size}'
        fix = (
            f"replace `train_batch_size` with {own}"
            if "train_batch_size" in config.raw
            else f"set {own}"
        )
        raise ValueError(
            "The data loader's `batch_size` must equal `train_micro_batch_size_per_gpu` "
            f"({micro}), got {size}. The config specifies {config.batch}. Create the loader with "
            f"`batch_size={micro}`, or {fix}."
        )


def _read_batch_size(loader: Any) -> int | None:
    """Return the batch size of a data loader, or None if it is unknown."""
    for part in find_samplers(loader)[:2]:
        size = getattr(part, "batch_size", None)
        if isinstance(size, int):
            return size
    return None


def _overrides_iteration(loader: DataLoader[Any]) -> bool:
    """Return whether a data loader's class changes how torch's DataLoader yields batches."""
    names = ("__iter__", "_get_iterator")
    return any(getattr(type(loader), name) is not getattr(DataLoader, name) for name in names)


def _use_loader(loader: Any, config: Config, ranks: Ranks) -> RunLoader:
    is_sharded = _check_shard(loader, ranks)
    is_map_style = not isinstance(getattr(loader, "dataset", None), IterableDataset | None)
    if ranks.data_ranks > 1 and is_map_style and not is_sharded:
        raise ValueError(
            f"{type(loader).__name__} must split its samples across {ranks.data_ranks} ranks. "
            f"Create it with `sampler={_describe_sampler(ranks)}`."
        )
    if not has_state(loader) and ranks.rank == 0:
        log.warning(
            "%s overrides how batches are yielded, so a resumed run loads and discards the "
            "batches before the saved position; make sure that the order of the samples in each "
            "epoch is reproducible",
            type(loader).__name__,
        )
    repeats = None if is_sharded or is_map_style else _build_repeat_check(config, ranks, loader)
    return RunLoader(loader, ranks, repeats=repeats)


def _describe_sampler(ranks: Ranks) -> str:
    shard = "" if ranks.shard is None else f", {ranks.data_ranks}, {ranks.data_rank}"
    return f"DistributedSampler(dataset{shard})"


def _check_shard(source: Any, ranks: Ranks) -> bool:
    """Return whether a loader's sampler yields only this rank's samples, like `DistributedSampler`.

    Raises:
        ValueError: the sampler is for a different rank, or for a different number of ranks.
    """
    for sampler in find_samplers(source):
        shard = getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None)
        if None in shard:
            continue
        if shard != (ranks.data_rank, ranks.data_ranks):
            raise ValueError(
                f"The sampler must yield the samples of rank {ranks.data_rank} of "
                f"{ranks.data_ranks}, got the samples of rank {shard[0]} of {shard[1]}. Create the "
                f"{type(sampler).__name__} after `engine.initialize`, or use a sampler that does "
                "not split the samples."
            )
        return True
    return False


def _rebuild_loader(loader: DataLoader[Any], config: Config, ranks: Ranks) -> tuple[RunLoader, str]:
    """Rebuild ``loader`` as a `RunLoader` with the same dataset and settings.

    Return the new loader, and a description of it for the log.
    """
    settings = {name: getattr(loader, name) for name in _SETTINGS if hasattr(loader, name)}
    settings["pin_memory"] &= ranks.device.type == "cuda"  # torch warns on the CPU
    if not settings.get("in_order", True) and ranks.rank == 0:
        log.warning(
            "with `in_order=False`, a resumed run may repeat some batches and skip others; to "
            "prevent this, set `in_order=True`"
        )
    if isinstance(loader.dataset, IterableDataset):
        settings |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        built = build_run_loader(loader.dataset, settings, None, config, ranks)
        return built, "reads an iterable dataset, which must split its samples across the ranks"
    if loader.batch_sampler is None:
        settings["batch_size"] = None
    order = _read_order(loader, config, ranks)
    _check_same_order(order, ranks)
    built = build_run_loader(loader.dataset, settings, order, config, ranks)
    sampler = find_samplers(loader)[-1]
    is_split = ranks.data_ranks > 1 and not order.is_sharded
    split = f", and split across {ranks.data_ranks} ranks" if is_split else ""
    return built, f"is used with its {type(sampler).__name__}{split}"


def _read_order(loader: DataLoader[Any], config: Config, ranks: Ranks) -> EpochOrder:
    source = find_samplers(loader)[1]
    drop_last = bool(getattr(source, "drop_last", False))
    is_batched = type(source) is not BatchSampler
    source = source if is_batched else source.sampler
    if not hasattr(source, "__len__"):
        raise ValueError(
            f"{type(source).__name__} must have a length. Add a `__len__` method that returns the "
            f"number of {'micro-batches' if is_batched else 'samples'} per epoch."
        )
    return order_sampler(
        source,
        config,
        name=f"len({type(source).__name__})",
        length=len(source),
        drop_last=drop_last,
        is_batched=is_batched,
        is_sharded=_check_shard(source, ranks),
    )


def _check_same_order(order: EpochOrder, ranks: Ranks) -> None:
    """Check that the samplers of all ranks agree.

    Samplers that split the samples across the ranks must have the same length. Other samplers must
    yield the same samples in the same order.

    Raises:
        ValueError: the samplers of two ranks do not agree.
    """
    if ranks.world_size == 1:
        return
    items = b"" if order.is_sharded else repr(list(order.draw(0))).encode()
    found = gather_if_different(ranks, (order.length, hashlib.sha256(items).hexdigest()))
    for rank, other in enumerate(found):
        if other != found[0]:
            lengths = f" (`{order.name}` is {found[0][0]} and {other[0]})"
            raise ValueError(
                f"The samplers of rank 0 and rank {rank} differ"
                f"{lengths if other[0] != found[0][0] else ''}. Use a sampler that yields the same "
                "samples in the same order on all ranks, or one that splits the samples equally "
                "across the ranks and has the attributes `rank` and `num_replicas`, as "
                "`DistributedSampler` does."
            )


def _build_repeat_check(config: Config, ranks: Ranks, loader: Any) -> RepeatCheck | None:
    if config.backend.name == "deepspeed":  # ranks that share a model load the same batches
        return None
    return RepeatCheck(ranks, getattr(loader, "num_workers", 0))


def build_run_loader(
    dataset: Dataset[Any],
    settings: dict[str, Any],
    order: EpochOrder | None,
    config: Config,
    ranks: Ranks,
) -> RunLoader:
    """Build the data loader of a run from a dataset.

    Args:
        dataset: dataset to load.
        settings: keyword arguments for torch's DataLoader. If the dataset returns whole
            micro-batches, set ``batch_size`` to None in ``settings``.
        order: order of the samples; None for an iterable dataset, which has its own order.
        config: config with the batch sizes and the seed.
        ranks: device, rank and world size of this process.
    """
    seed, generator = config.data.seed, torch.Generator()
    if order is None:
        loader = DataLoader(dataset, generator=generator, **settings)
        if loader.persistent_workers and ranks.rank == 0:
            log.warning(
                "persistent workers of an iterable dataset do not reseed their random number "
                "generators in each epoch, so a resumed run may draw different random numbers; to "
                "avoid this, disable `persistent_workers`"
            )
        repeats = _build_repeat_check(config, ranks, loader)
        return RunLoader(loader, ranks, seed=seed, generator=generator, repeats=repeats)
    sampler = GlobalBatchSampler(
        order, config, ranks.data_rank, seeds_workers=settings["num_workers"] > 0
    )
    key = "sampler" if "batch_size" in settings else "batch_sampler"
    loader = DataLoader(dataset, generator=generator, **(settings | {key: sampler}))
    return RunLoader(loader, ranks, seed=seed, generator=generator, sampler=sampler)

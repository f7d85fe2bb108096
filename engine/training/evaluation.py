"""Evaluate a model on a dataset, on one or more ranks."""

from __future__ import annotations

import contextlib
import hashlib
import math
import numbers
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from engine.distributed.ranks import Ranks
from engine.distributed.waiting import warn_of_long_wait
from engine.training.device_moves import map_leaves, move_to_device
from engine.training.loader import RunLoader

__all__ = ["Evaluator", "Metrics", "Scalar", "evaluation_mode", "preserve_modes"]

Scalar = Tensor | float
Metrics = Mapping[str, Any]  # mypy infers `object` for a dict of floats and tensors

_NO_BATCH = object()

_Row = tuple[str | None, Any, Any]
"""A metric's name (None for a loss), its mean over a batch, and the batch's number of samples."""


@contextlib.contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Restore the train or eval mode of every submodule on exit."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        # A module may do more than set its mode in `train`: LoRA layers unmerge their weights.
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and disable gradients inside this context."""
    with preserve_modes(model), torch.no_grad():
        model.eval()
        yield


class Evaluator:
    """Evaluator that averages metrics over a dataset and gathers tensors from all ranks.

    All ranks process the same number of batches, because a forward pass may gather parameters from
    all ranks. A rank that has no batches left repeats an earlier batch and drops the results.

    Args:
        ranks: rank, world size and device of this process.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._call = "gather"  # the call in progress, for messages
        # Of the ranks that share a model, only the first rank contributes rows.
        self._is_first_of_shard = ranks.shard is None or self._find_first_of_shard() == ranks.rank
        self._is_repeating = False  # whether to drop the results of the current batch

    def average(self, loader: Iterable[Any], fn: Callable[[Any], Any]) -> Any:
        """Return the mean of each metric over the samples of all ranks; see `Engine.evaluate`."""
        if isinstance(loader, RunLoader):
            raise ValueError(  # noqa: TRY004  # it is the wrong loader, not the wrong type
                "`loader` must not be the training loader, because an evaluation would start the "
                "next epoch. Pass a new `DataLoader` for the dataset."
            )
        rows: list[_Row] = []
        self._call = "evaluate"
        try:
            for batch, is_repeated in self._iterate(loader):
                self._is_repeating = is_repeated
                moved = move_to_device(batch, self._ranks.device)
                samples = _count_samples(moved)  # before `fn`, which may change the batch
                found = _read_result(fn(moved), samples)
                if not is_repeated:
                    rows += found
            own = [(name, float(value), float(count)) for name, value, count in rows]
            return _compute_means([row for part in self._gather_objects(own) for row in part])
        finally:
            self._is_repeating, self._call = False, "gather"

    def gather(self, value: Any) -> Any:
        """Return the concatenated tensors of all ranks; see `Engine.gather`."""
        return map_leaves(self._gather_tensor, value)

    def _gather_tensor(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise ValueError(  # noqa: TRY004  # as for every other argument
                f"`value` must contain only tensors, got {value!r}. Convert numbers with "
                "`torch.tensor`."
            )
        tensor: Tensor = value.detach()
        tensor = tensor if tensor.dim() else tensor.reshape(1)
        if self._is_repeating or not self._is_first_of_shard:
            tensor = tensor[:0]
        if self._ranks.world_size == 1:
            return tensor
        kinds = self._gather_objects((len(tensor), tensor.shape[1:], tensor.dtype))
        if any(kind[1:] != kinds[0][1:] for kind in kinds):
            got = [((rows, *shape), dtype) for rows, shape, dtype in kinds]
            raise ValueError(
                "`value` must have the same dtype on every rank, and the same shape except for the "
                f"first dimension, got {got}. Pad or convert the tensor first."
            )
        # Gather bytes, because gloo does not support every dtype.
        own = _to_bytes(tensor)
        row_size = tensor.shape[1:].numel() * tensor.element_size()
        padded = own.new_zeros(max(rows for rows, *_ in kinds) * row_size)
        padded[: own.numel()] = own
        parts = [torch.empty_like(padded) for _ in kinds]
        # NCCL gathers only tensors on a GPU.
        group = self._ranks.control_group if tensor.device.type == "cpu" else None
        dist.all_gather(parts, padded, group=group)
        return torch.cat(
            [
                part[: rows * row_size].view(tensor.dtype).reshape(rows, *tensor.shape[1:])
                for part, (rows, *_) in zip(parts, kinds, strict=True)
            ]
        )

    def _gather_objects(self, value: Any) -> list[Any]:
        values = [value] * self._ranks.world_size
        if self._ranks.world_size > 1:
            with warn_of_long_wait(self._call, self._ranks):
                dist.all_gather_object(values, value, group=self._ranks.control_group)
        return values

    def _find_first_of_shard(self) -> int:
        return self._gather_objects(self._ranks.shard).index(self._ranks.shard)

    def _iterate(self, loader: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """Return an iterator over pairs ``(batch, is_repeated)``.

        If ``is_repeated`` is true, this rank has no new batch, and the results for the repeated
        batch must be dropped.
        """
        if self._ranks.world_size == 1:
            return ((batch, False) for batch in loader)
        plans = self._gather_objects(_plan_split(loader))
        if plans[0] is None or any(plan != plans[0] for plan in plans):
            return self._iterate_own(loader)
        assert isinstance(loader, DataLoader)
        samples, size, drop_last, _ = plans[0]
        return self._iterate_split(loader, list(BatchSampler(range(samples), size, drop_last)))

    def _iterate_split(
        self, loader: DataLoader[Any], batches: list[list[int]]
    ) -> Iterator[tuple[Any, bool]]:
        """Return pairs like those of `_iterate`, for this rank's subset of ``batches``."""
        size = self._ranks.data_ranks
        own = batches[self._ranks.data_rank :: size]
        repeats = len(batches[::size]) - len(own)
        split = _copy_loader(loader, own + batches[:repeats], loader.num_workers, loader.generator)
        return ((batch, index >= len(own)) for index, batch in enumerate(split))

    def _iterate_own(self, loader: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """Yield pairs like those of `_iterate`, for all batches of this rank's ``loader``.

        A rank that has no batches left repeats its last batch until all ranks have finished. A rank
        whose loader is empty repeats the first batch of another rank.
        """
        batches, last = iter(loader), _NO_BATCH
        while True:
            batch = next(batches, _NO_BATCH)
            have_batch = self._gather_objects(batch is not _NO_BATCH)
            if not any(have_batch):
                return
            if last is _NO_BATCH and not all(have_batch):  # in the first round, on every rank
                sent, source = [batch], have_batch.index(True)
                dist.broadcast_object_list(sent, source, group=self._ranks.control_group)
                last = sent[0]
            last = last if batch is _NO_BATCH else batch
            yield last, batch is _NO_BATCH


def _plan_split(loader: Iterable[Any]) -> tuple[int, int, bool, str] | None:
    """Return a tuple that describes a loader, or None if the loader's data cannot be split.

    The tuple contains the number of samples, the batch size, ``drop_last`` and a hash of the first
    sample. The hash is an empty string if the dataset is empty or the loader has a
    `DistributedSampler`. If the tuples of all ranks are equal, the ranks are assumed to have the
    same dataset, and its batches are split across the ranks. Otherwise, each rank processes all
    batches of its own loader.
    """
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return None
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return None
    sampler: Any = batches.sampler
    is_distributed = isinstance(sampler, DistributedSampler)
    is_shuffled = type(sampler) is RandomSampler and not sampler.replacement
    if not (is_distributed or is_shuffled or type(sampler) is SequentialSampler):
        return None
    samples = len(loader.dataset)  # type: ignore[arg-type]  # Dataset does not declare __len__
    if not is_distributed and len(sampler) != samples:
        return None
    # With a `DistributedSampler`, every rank has the whole dataset.
    first = _hash_first_sample(loader) if samples and not is_distributed else ""
    return samples, batches.batch_size, batches.drop_last, first


def _hash_first_sample(loader: DataLoader[Any]) -> str:
    # Load the sample in a worker if the loader has workers, because files that a dataset opens on
    # first use must not be opened before workers are forked.
    probe = _copy_loader(loader, [[0]], min(loader.num_workers, 1), None)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # random transforms must be equal on all ranks
        batch = next(iter(probe))

    def to_plain(leaf: Any) -> Any:  # pickled tensors contain addresses
        is_tensor = isinstance(leaf, Tensor)
        return _to_bytes(leaf.to_dense()).cpu().numpy().tobytes() if is_tensor else leaf

    return hashlib.sha256(pickle.dumps(map_leaves(to_plain, batch))).hexdigest()


def _copy_loader(
    loader: DataLoader[Any],
    batches: list[list[int]],
    num_workers: int,
    generator: torch.Generator | None,
) -> DataLoader[Any]:
    """Copy a data loader, but use the given lists of sample indices as its batches."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        generator=generator,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def _to_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _read_result(result: Any, samples: int | None) -> list[_Row]:
    """Check the result of the user's function for a batch, and return a `_Row` per metric.

    Tensors stay on their device.
    """
    has_count = isinstance(result, tuple) and len(result) == 2
    metrics, count = result if has_count else (result, samples)
    if count is None:
        raise ValueError(
            "The number of samples is unknown, because the batch does not contain a tensor. "
            "Return `(metrics, number_of_samples)` from `fn`."
        )
    count = _check_number(count, "the number of samples")
    named = metrics if isinstance(metrics, Mapping) else {None: metrics}
    return [
        (name, _check_number(value, "the loss" if name is None else f"`{name}`"), count)
        for name, value in named.items()
    ]


def _check_number(value: Any, what: str) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().clone()  # a view would keep the whole batch in memory
    if isinstance(value, numbers.Real):
        return value
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(
        f"`fn` must return one number for {what}, got {got}. Return the mean over the batch, such "
        "as `loss.mean()`, or a dict of such means."
    )


def _count_samples(batch: Any) -> int | None:
    """Return the length of a batch's first tensor, or None if the batch contains no tensor.

    >>> _count_samples({"ids": ["a", "b"], "x": torch.ones(2, 5)})
    2
    """
    lengths: list[int] = []

    def add(leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            lengths.append(leaf.shape[0] if leaf.dim() else 1)

    map_leaves(add, batch)
    return lengths[0] if lengths else None


def _compute_means(rows: Sequence[_Row]) -> Any:
    """Return the mean of each metric, or of the loss, weighted by the number of samples."""
    named: dict[str | None, list[tuple[float, float]]] = {}
    for name, value, count in rows:
        if not count >= 0:
            raise ValueError(
                f"`fn` must return a number of samples >= 0, got {count:g}. Return the number of "
                "samples over which the metrics are averaged."
            )
        if count > 0:
            named.setdefault(name, []).append((value * count, count))
    if not named:
        raise ValueError(
            "`loader` must yield at least one sample, got 0. Check the dataset and `drop_last`. "
            "If `loader` is a generator, create a new generator for each evaluation."
        )
    means = {
        name: _sum([value for value, _ in pairs]) / _sum([count for _, count in pairs])
        for name, pairs in named.items()
    }
    return means.get(None, means)


def _sum(values: list[float]) -> float:
    """Return the sum of the values. If all are finite, their order does not affect the sum."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)

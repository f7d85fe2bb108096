"""Derive the batch sizes that a config does not set.

train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks

Ranks that process the same samples, such as those of a pipeline, count as one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from engine.config.wording import count_noun

__all__ = [
    "BATCH_KEYS",
    "PIPELINE_STAGES",
    "BatchError",
    "BatchSizes",
    "DataRanks",
    "RankCounter",
    "count_data_ranks",
    "count_ranks_per_model",
    "derive_batch_sizes",
]

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
BATCH_KEYS = (TRAIN, MICRO, ACCUMULATION)
PIPELINE_STAGES = "pipeline.stages"


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of a run.

    ``train`` is the number of samples per optimizer step, summed over all ranks. ``micro`` is the
    number of samples per forward pass on one rank. ``accumulation`` is the number of micro-batches
    per optimizer step. ``data_ranks`` is the number of data-parallel ranks. ``unit`` is the name
    of these ranks in messages: "rank" or "data-parallel rank".
    """

    train: int
    micro: int
    accumulation: int
    data_ranks: int
    unit: str = "rank"

    def __str__(self) -> str:
        return (
            f"batch size {self.train} = {self.micro} per rank "
            f"x {count_noun(self.accumulation, 'accumulation step')} "
            f"x {count_noun(self.data_ranks, self.unit)}"
        )

    def with_train(self, train: int) -> BatchSizes:
        """Return a copy with a new train batch size and the same micro-batch size.

        The number of gradient accumulation steps changes accordingly.

        Raises:
            ValueError: if ``train`` is not a positive multiple of the micro-batch size times the
                number of data-parallel ranks.
        """
        at_once = self.micro * self.data_ranks
        if train <= 0 or train % at_once:
            raise ValueError(
                f"`train_batch_size` must be a positive multiple of {at_once} (micro-batch size "
                f"{self.micro} x {count_noun(self.data_ranks, self.unit)}), got {train}. Use "
                f"{max(train // at_once, 1) * at_once}."
            )
        return replace(self, train=train, accumulation=train // at_once)

    def with_micro(self, micro: int) -> BatchSizes:
        """Return a copy with a new micro-batch size and the same number of accumulation steps.

        The train batch size changes accordingly.

        Raises:
            ValueError: if the micro-batch size is not positive.
        """
        if micro <= 0:
            raise ValueError(
                f"`micro_batch_size` must be >= 1, got {micro}. Pass the number of samples per "
                "forward pass on one rank."
            )
        return replace(self, micro=micro, train=micro * self.accumulation * self.data_ranks)


class BatchError(ValueError):
    """Raised when the batch sizes are inconsistent or cannot be derived.

    ``key`` is the config key to change. ``hint`` describes the fix.
    """

    def __init__(self, key: str, message: str, hint: str) -> None:
        self.key = key
        self.message = message
        self.hint = hint
        super().__init__(key, message, hint)  # unpickling passes these to `__init__`

    def __str__(self) -> str:
        return self.message


class DataRanks(NamedTuple):
    """The number of data-parallel ranks.

    Ranks that share a model replica count as one.
    """

    number: int
    tensor_parallel: int = 1
    """Number of tensor-parallel ranks per model replica.

    With AutoTP, DeepSpeed's train batch size counts each sample once per tensor-parallel rank.
    """
    unit: str = "rank"


RankCounter = Callable[[Mapping[str, Any], int], DataRanks]
"""Function that takes a config and the world size, and returns the `DataRanks` of the run."""


def count_ranks_per_model(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the degree of each kind of parallelism within a model replica, by config key.

    Degrees of 1 are omitted. The product of the degrees is the number of ranks per replica.

    >>> count_ranks_per_model({"sequence_parallel_size": 2})
    {'sequence_parallel_size': 2}
    """
    pipeline = config.get("pipeline", {})
    if config.get("engine", {}).get("backend") == "torch":
        pipeline = {}  # only DeepSpeed supports pipeline models
    sizes = {
        "sequence_parallel_size": config.get("sequence_parallel_size"),
        "tensor_parallel.autotp_size": config.get("tensor_parallel", {}).get("autotp_size"),
        PIPELINE_STAGES: pipeline.get("stages"),
    }
    return {key: size for key, size in sizes.items() if isinstance(size, int) and size > 1}


def count_data_ranks(config: Mapping[str, Any], world_size: int) -> DataRanks:
    """Return the number of data-parallel ranks, based on the parallelism keys."""
    sizes = count_ranks_per_model(config)
    if not sizes:
        return DataRanks(world_size)
    tensor_parallel = sizes.get("tensor_parallel.autotp_size", 1)
    count = max(1, world_size // math.prod(sizes.values()))
    return DataRanks(count, tensor_parallel, "data-parallel rank")


def derive_batch_sizes(given: Mapping[str, int], ranks: DataRanks | int) -> BatchSizes:
    """Return the batch sizes of a run, including sizes that the config does not set.

    Any two of train batch size, micro-batch size and gradient accumulation steps determine the
    third. If only the train batch size or only the micro-batch size is set, the number of gradient
    accumulation steps is 1, as in DeepSpeed.

    Args:
        given: values that the config sets, by key (see `BATCH_KEYS`); each is at least 1. The
            train batch size may count each sample once per tensor-parallel rank, as in DeepSpeed.
        ranks: number of data-parallel ranks, at least 1.

    Raises:
        BatchError: if the values are inconsistent, or neither the train batch size nor the
            micro-batch size is set.

    >>> given = {"train_batch_size": 32, "gradient_accumulation_steps": 2}
    >>> print(derive_batch_sizes(given, 4))
    batch size 32 = 4 per rank x 2 accumulation steps x 4 ranks
    """
    ranks = DataRanks(ranks) if isinstance(ranks, int) else ranks
    try:
        return _derive(given, ranks)
    except BatchError:
        counts_all, rest = divmod(given.get(TRAIN, 1), ranks.tensor_parallel)
        if ranks.tensor_parallel == 1 or rest:
            raise
        try:
            return _derive({**given, TRAIN: counts_all}, ranks)
        except BatchError:
            pass
        raise


def _derive(given: Mapping[str, int], ranks: DataRanks) -> BatchSizes:
    count, unit = ranks.number, ranks.unit
    train, micro, accumulation = (given.get(key) for key in BATCH_KEYS)
    if train is None and micro is None:
        raise BatchError(
            "", f"`{TRAIN}` or `{MICRO}` must be set.", f'For example, add "{TRAIN}": 32.'
        )
    if train is None:
        assert micro is not None
        accumulation = accumulation or 1
        return BatchSizes(micro * accumulation * count, micro, accumulation, count, unit)
    if micro is not None and accumulation is not None:
        if train != micro * accumulation * count:
            raise _build_mismatch_error(train, micro, accumulation, ranks)
        return BatchSizes(train, micro, accumulation, count, unit)
    if micro is not None:
        rest = _divide(train, micro, ranks, MICRO)
        return BatchSizes(train, micro, rest, count, unit)
    accumulation = accumulation or 1
    rest = _divide(train, accumulation, ranks, ACCUMULATION)
    return BatchSizes(train, rest, accumulation, count, unit)


def _divide(train: int, by: int, ranks: DataRanks, key: str) -> int:
    at_once = by * ranks.number
    whole, rest = divmod(train, at_once)
    if rest:
        near = [size for size in (train - rest, train - rest + at_once) if size]
        factors = f"`{key}` ({by}) x {count_noun(ranks.number, ranks.unit)}"
        if by == 1:
            factors = f"the number of {ranks.unit}s ({ranks.number:,})"
        # Without its key, the micro-batch is train / ranks. Do not suggest a larger micro-batch.
        is_removable = key == MICRO and whole == 0 and train % ranks.number == 0
        raise BatchError(
            TRAIN,
            f"`{TRAIN}` must be a multiple of {factors}, got {train}.",
            f"Set `{TRAIN}` to {' or '.join(map(str, near))}"
            f"{f', or remove `{key}`' if is_removable else ''}.",
        )
    return whole


def _build_mismatch_error(
    train: int, micro: int, accumulation: int, ranks: DataRanks
) -> BatchError:
    product = micro * accumulation * ranks.number
    return BatchError(
        TRAIN,
        f"`{TRAIN}` must be `{MICRO}` ({micro}) x `{ACCUMULATION}` ({accumulation}) x "
        f"{count_noun(ranks.number, ranks.unit)} = {product}, got {train}.",
        f"Set `{TRAIN}` to {product}, or remove one of the three keys.",
    )

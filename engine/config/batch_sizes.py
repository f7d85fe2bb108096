"""Batch arithmetic: train batch size = micro-batch size x accumulation steps x number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.wording import count_noun

__all__ = ["BATCH_KEYS", "BatchError", "BatchSizes", "solve"]

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
BATCH_KEYS = (TRAIN, MICRO, ACCUMULATION)


@dataclass(frozen=True)
class BatchSizes:
    """Samples of an optimizer update over all ranks, of a forward pass on one, and their ratio."""

    train: int
    micro: int
    accumulation: int
    world_size: int

    def __str__(self) -> str:
        return (
            f"batch {self.train} = {self.micro} a rank x {self.accumulation} accumulated "
            f"x {count_noun(self.world_size, 'rank')}"
        )


class BatchError(ValueError):
    """Batch sizes that do not multiply; ``key`` is the one to change and ``hint`` says to what."""

    def __init__(self, key: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


def solve(given: Mapping[str, int], world_size: int) -> BatchSizes:
    """Return the batch sizes, deriving what is not given.

    Two of the three give the third; of one alone, accumulation is 1 (as in DeepSpeed).

    Args:
        given: any of `BATCH_KEYS` to its value, each 1 or more.
        world_size: number of ranks, 1 or more.

    Raises:
        BatchError: the sizes do not multiply, or none of them is given.

    >>> print(solve({"train_batch_size": 32, "gradient_accumulation_steps": 2}, world_size=4))
    batch 32 = 4 a rank x 2 accumulated x 4 ranks
    """
    train, micro, accumulation = (given.get(key) for key in BATCH_KEYS)
    if train is None and micro is None:
        raise BatchError(
            "", f"`{TRAIN}` or `{MICRO}` must be given, but neither is.", f'Add "{TRAIN}": 32.'
        )
    if train is None:
        assert micro is not None
        accumulation = accumulation or 1
        return BatchSizes(micro * accumulation * world_size, micro, accumulation, world_size)
    if micro is not None and accumulation is not None:
        if train != micro * accumulation * world_size:
            raise _no_product(train, micro, accumulation, world_size)
        return BatchSizes(train, micro, accumulation, world_size)
    if micro is not None:
        rest = _divided(train, micro, world_size, f"`{MICRO}` ({micro})")
        return BatchSizes(train, micro, rest, world_size)
    accumulation = accumulation or 1
    rest = _divided(train, accumulation, world_size, f"`{ACCUMULATION}` ({accumulation})")
    return BatchSizes(train, rest, accumulation, world_size)


def _divided(train: int, by: int, world_size: int, factor: str) -> int:
    whole, rest = divmod(train, by * world_size)
    if rest:
        near = [size for size in (train - rest, train - rest + by * world_size) if size]
        raise BatchError(
            TRAIN,
            f"`{TRAIN}` must be a multiple of {factor} x {count_noun(world_size, 'rank')}, "
            f"but is {train} instead.",
            f"The nearest {'is' if len(near) == 1 else 'are'} {' and '.join(map(str, near))}.",
        )
    return whole


def _no_product(train: int, micro: int, accumulation: int, world_size: int) -> BatchError:
    product = micro * accumulation * world_size
    return BatchError(
        TRAIN,
        f"`{TRAIN}` must be `{MICRO}` ({micro}) x `{ACCUMULATION}` ({accumulation}) x "
        f"{count_noun(world_size, 'rank')} = {product}, but is {train} instead.",
        f"Make it {product}, or leave one of the three out: it is derived then.",
    )

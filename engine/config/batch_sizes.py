"""Derive the batch sizes that a config does not set.

train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x world size
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.config.wording import count_noun
from schedules.core.saved_state import Size

__all__ = ["BATCH_KEYS", "BatchError", "BatchSizes", "derive_batch_sizes"]

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
BATCH_KEYS = (TRAIN, MICRO, ACCUMULATION)


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of a run.

    ``train`` is the number of samples per optimizer step, summed over all ranks. ``micro`` is the
    number of samples per forward pass on one rank. ``accumulation`` is the number of micro-batches
    per optimizer step.
    """

    train: Size
    micro: Size
    accumulation: Size
    world_size: Size

    def __str__(self) -> str:
        return (
            f"batch size {self.train} = {self.micro} per rank "
            f"x {count_noun(self.accumulation, 'accumulation step')} "
            f"x {count_noun(self.world_size, 'rank')}"
        )

    def with_train(self, train: int) -> BatchSizes:
        """Return the sizes with another batch size and the same micro-batch size.

        Raises:
            ValueError: the batch size is not a positive multiple of what the ranks process at once.
        """
        at_once = self.micro * self.world_size
        if train <= 0 or train % at_once:
            raise ValueError(
                f"`train_batch_size` must be a positive multiple of {at_once}, the micro-batch "
                f"size times the world size, got {train}. Use {max(train // at_once, 1) * at_once}."
            )
        return replace(self, train=train, accumulation=train // at_once)

    def with_micro(self, micro: int) -> BatchSizes:
        """Return the sizes with another micro-batch size and as many micro-batches per step.

        Raises:
            ValueError: the micro-batch size is not positive.
        """
        if micro <= 0:
            raise ValueError(
                f"`micro_batch_size` must be >= 1, got {micro}. Pass a rank's number of samples."
            )
        return replace(self, micro=micro, train=micro * self.accumulation * self.world_size)


class BatchError(ValueError):
    """Raised if the batch sizes are inconsistent, or cannot be derived.

    ``key`` is the config key to change. ``hint`` describes the fix.
    """

    def __init__(self, key: str, message: str, hint: str) -> None:
        self.key = key
        self.message = message
        self.hint = hint
        super().__init__(key, message, hint)  # unpickling passes these to `__init__`

    def __str__(self) -> str:
        return self.message


def derive_batch_sizes(given: Mapping[str, int], world_size: int) -> BatchSizes:
    """Return the batch sizes of a run, and derive those that the config does not set.

    Any two of train batch size, micro-batch size and gradient accumulation steps determine the
    third. If only one of the two batch sizes is set, the number of gradient accumulation steps is
    1, as in DeepSpeed.

    Args:
        given: values that the config sets, by key (one of `BATCH_KEYS`); each is at least 1.
        world_size: number of ranks, at least 1.

    Raises:
        BatchError: the values are inconsistent, or neither the train batch size nor the
            micro-batch size is set.

    >>> given = {"train_batch_size": 32, "gradient_accumulation_steps": 2}
    >>> print(derive_batch_sizes(given, world_size=4))
    batch size 32 = 4 per rank x 2 accumulation steps x 4 ranks
    """
    train, micro, accumulation = (given.get(key) for key in BATCH_KEYS)
    if train is None and micro is None:
        raise BatchError(
            "", f"`{TRAIN}` or `{MICRO}` must be set.", f'Add, for example, "{TRAIN}": 32.'
        )
    if train is None:
        assert micro is not None
        accumulation = accumulation or 1
        return BatchSizes(micro * accumulation * world_size, micro, accumulation, world_size)
    if micro is not None and accumulation is not None:
        if train != micro * accumulation * world_size:
            raise _build_mismatch_error(train, micro, accumulation, world_size)
        return BatchSizes(train, micro, accumulation, world_size)
    if micro is not None:
        rest = _divide(train, micro, world_size, f"`{MICRO}` ({micro})")
        return BatchSizes(train, micro, rest, world_size)
    accumulation = accumulation or 1
    rest = _divide(train, accumulation, world_size, f"`{ACCUMULATION}` ({accumulation})")
    return BatchSizes(train, rest, accumulation, world_size)


def _divide(train: int, by: int, world_size: int, factor: str) -> int:
    whole, rest = divmod(train, by * world_size)
    if rest:
        near = [size for size in (train - rest, train - rest + by * world_size) if size]
        raise BatchError(
            TRAIN,
            f"`{TRAIN}` must be a multiple of {factor} x {count_noun(world_size, 'rank')}, "
            f"got {train}.",
            f"Set it to {' or '.join(map(str, near))}.",
        )
    return whole


def _build_mismatch_error(train: int, micro: int, accumulation: int, world_size: int) -> BatchError:
    product = micro * accumulation * world_size
    return BatchError(
        TRAIN,
        f"`{TRAIN}` must be `{MICRO}` ({micro}) x `{ACCUMULATION}` ({accumulation}) x "
        f"{count_noun(world_size, 'rank')} = {product}, got {train}.",
        f"Set it to {product}, or remove one of the three keys.",
    )

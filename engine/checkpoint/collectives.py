"""Synchronize the ranks before and during a save, and raise the error of one rank on all ranks."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from engine.distributed.ranks import Ranks

__all__ = ["call_on_rank_0", "check_same_tag", "raise_on_all_ranks", "wait_for_ranks"]

T = TypeVar("T")

_TIMEOUT = dt.timedelta(seconds=30)


def wait_for_ranks(ranks: Ranks, call: str) -> None:
    """Block until every rank has called this function, for at most 30 seconds.

    Args:
        ranks: rank, world size and control group of this process.
        call: user's call that every rank must make, such as ``save_checkpoint('runs/1')``; used
            only in the error message.

    Raises:
        RuntimeError: if a rank does not call this function in time. On rank 0, the message lists
            all missing ranks.
    """
    if ranks.world_size == 1:
        return
    try:
        dist.monitored_barrier(ranks.control_group, timeout=_TIMEOUT, wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{call} must be called on every rank, but some ranks did not reach it within "
            f"{_TIMEOUT.seconds} seconds: {error}. Call it outside of any `if rank == 0` block."
        ) from None


def check_same_tag(tag: str, world_size: int) -> None:
    """Check that all ranks pass the same tag, so that they write to the same checkpoint.

    Args:
        tag: tag that this rank passes.
        world_size: number of ranks.

    Raises:
        ValueError: if the tags differ between ranks.
    """
    tags = _gather(tag, world_size)
    if len(set(tags)) > 1:
        raise ValueError(
            f"`tag` must be the same on all ranks, got {tags}. Pass the same tag on each rank."
        )


def call_on_rank_0(ranks: Ranks, function: Callable[[], T]) -> T:
    """Return the result of a function that only rank 0 calls. Every rank must call this.

    Raises:
        Exception: on every rank, the exception that the function raised on rank 0.
    """
    result: list[Any] = [None, None]
    if ranks.rank == 0:
        try:
            result[0] = function()
        except Exception as error:  # noqa: BLE001  # all ranks must learn of any error
            result[1] = error
    if ranks.world_size > 1:
        dist.broadcast_object_list(result, src=0)
    value, failure = result
    if failure is not None:
        raise failure
    found: T = value
    return found


@contextlib.contextmanager
def raise_on_all_ranks(
    world_size: int, consequence: str = "The checkpoint was not written"
) -> Iterator[None]:
    """Raise an exception on all ranks if the ``with`` block raises one on any rank.

    Otherwise, the other ranks would wait indefinitely in the next collective operation. Every rank
    must enter the block.

    Args:
        world_size: number of ranks.
        consequence: start of the message on ranks on which the block did not fail.

    Raises:
        Exception: the exception that the block raised on this rank.
        RuntimeError: if the block raised an exception on another rank only.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  # all ranks must learn of any error
        failure = error
    texts = _gather(failure and f"{type(failure).__name__}: {failure}", world_size)
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text:
            raise RuntimeError(f"{consequence} because rank {rank} failed: {text}")


def _gather(value: Any, world_size: int) -> list[Any]:
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values

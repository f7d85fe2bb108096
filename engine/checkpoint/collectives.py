"""Steps of a save that every rank takes together, and that fail on all ranks or on none."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from engine.distributed.ranks import Ranks

__all__ = ["check_same_tag", "meet", "together"]

_PATIENCE = dt.timedelta(seconds=30)


def meet(ranks: Ranks, what: str) -> None:
    """Wait for the other ranks, but not forever: some may never make the call.

    Raises:
        RuntimeError: a rank did not come within 30 seconds; the message names it.
    """
    if ranks.world_size == 1:
        return
    try:
        dist.monitored_barrier(ranks.control_group, timeout=_PATIENCE, wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"every rank must come to {what}, but within {_PATIENCE.seconds} seconds not all did: "
            f"{error}. Call it on all ranks, outside of any `if rank == 0`."
        ) from None


def check_same_tag(tag: str, world_size: int) -> None:
    """Reject different tags: each rank would write a part of another checkpoint.

    Raises:
        ValueError: the ranks' tags differ.
    """
    tags = _gather(tag, world_size)
    if len(set(tags)) > 1:
        raise ValueError(f"`tag` must be the same on all ranks, but is {tags} instead.")


@contextlib.contextmanager
def together(world_size: int) -> Iterator[None]:
    """Run the block on every rank, and raise on all of them if it fails on any.

    A collective must start only when all ranks have succeeded so far: it would wait forever.

    Raises:
        RuntimeError: the block failed on another rank.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  # every rank has to know of it
        failure = error
    texts = _gather(failure and f"{type(failure).__name__}: {failure}", world_size)
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text:
            raise RuntimeError(f"the checkpoint was not written: rank {rank} failed: {text}")


def _gather(value: Any, world_size: int) -> list[Any]:
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values

"""Coordinate the ranks during saves and loads: an error on one rank is raised on all ranks."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from engine.distributed.ranks import Ranks, read_timeout

__all__ = [
    "call_on_rank_0",
    "check_same_tag",
    "find_missing_ranks",
    "raise_on_all_ranks",
    "wait_for_ranks",
]

log = logging.getLogger("onecycle")

T = TypeVar("T")

_PATIENCE = 30.0  # seconds
_TIMEOUT = 600.0  # seconds; the default of NCCL's collectives
_MAX_PAUSE = 0.1  # seconds between two checks
_calls = itertools.count()


def wait_for_ranks(ranks: Ranks, call: str) -> None:
    """Wait up to ten minutes for every rank to call this function.

    The environment variable ``ONECYCLE_TIMEOUT`` sets a different limit, in seconds. After 30
    seconds, the waiting rank with the lowest number logs a warning that lists the missing ranks.

    Args:
        ranks: rank and world size of this process.
        call: description of the call for messages, such as ``save_checkpoint('runs/1')``.

    Raises:
        RuntimeError: if a rank does not call this function in time. The message lists all missing
            ranks.
    """
    given = read_timeout()
    timeout = _TIMEOUT if given is None else given.total_seconds()

    def warn(missing: list[int]) -> None:
        names = _name_ranks(missing)
        log.warning("%s is waiting for %s (timeout: %g seconds)", call, names, timeout)

    missing = find_missing_ranks(ranks, timeout, warn)
    if missing:
        raise RuntimeError(
            f"{call} must be called on every rank, but {_name_ranks(missing)} did not reach it "
            f"within {timeout:g} seconds. Call it outside of any `if rank == 0` block."
        )


def _name_ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def find_missing_ranks(
    ranks: Ranks,
    timeout: float | None = None,
    on_delay: Callable[[list[int]], None] = lambda missing: None,
) -> list[int]:
    """Return the ranks that do not call this function before the timeout.

    The timeout starts when the first rank calls this function. The result is the same on all ranks.
    The function uses the process group's store, because ``torch.distributed.monitored_barrier``
    requires gloo and ignores its timeout if rank 0 is missing.

    Args:
        ranks: rank and world size of this process.
        timeout: timeout in seconds; None for 30 seconds.
        on_delay: function to call with the missing ranks after 30 seconds. Only the waiting rank
            with the lowest number calls it.
    """
    if ranks.world_size == 1:
        return []
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  # private in torch
    prefix = f"onecycle/save/{next(_calls)}"
    arrived, missing = [f"{prefix}/{rank}" for rank in range(ranks.world_size)], f"{prefix}/missing"
    store.set(arrived[ranks.rank], "")
    # Only the first result is stored: an empty list from the last rank, or the result of a timeout.
    if store.add(f"{prefix}/count", 1) == ranks.world_size:
        store.compare_set(missing, "", json.dumps([]))
    start, pause = time.monotonic(), 0.001
    deadline = start + (_PATIENCE if timeout is None else timeout)
    delay = start + _PATIENCE
    while not store.check([missing]):  # `store.wait` would block signal handlers
        if (now := time.monotonic()) > min(deadline, delay):
            absent = [rank for rank, key in enumerate(arrived) if not store.check([key])]
            if now > deadline:
                store.compare_set(missing, "", json.dumps(absent))
            else:
                delay = math.inf
                lowest = min(set(range(ranks.world_size)) - set(absent))
                if absent and ranks.rank == lowest:
                    on_delay(absent)
        time.sleep(pause)
        pause = min(2 * pause, _MAX_PAUSE)
    store.delete_key(arrived[ranks.rank])
    return list(json.loads(store.get(missing)))


def check_same_tag(tag: str, ranks: Ranks) -> None:
    """Check that all ranks pass the same checkpoint tag.

    Args:
        tag: tag that this rank passes.
        ranks: rank and world size of this process.

    Raises:
        ValueError: if the tags differ between ranks.
    """
    tags = _gather(tag, ranks)
    if len(set(tags)) > 1:
        raise ValueError(
            f"`tag` must be the same on all ranks, got {tags}. Pass the same tag on each rank."
        )


def call_on_rank_0(ranks: Ranks, function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 only, and return its result on every rank.

    Every rank must call `call_on_rank_0`.

    Raises:
        Exception: on every rank, the exception that ``function`` raised on rank 0.
    """
    result: list[Any] = [None, None]
    if ranks.rank == 0:
        try:
            result[0] = function()
        except Exception as error:  # noqa: BLE001  # all ranks must learn of any error
            result[1] = error
    if ranks.world_size > 1:
        dist.broadcast_object_list(result, src=0, group=ranks.control_group)
    value, failure = result
    if failure is not None:
        raise failure
    found: T = value
    return found


@contextlib.contextmanager
def raise_on_all_ranks(
    ranks: Ranks, consequence: str = "The checkpoint was not written"
) -> Iterator[None]:
    """Raise an exception on all ranks if the ``with`` block fails on any rank.

    Without this context manager, the other ranks would wait indefinitely in the next collective
    operation. Every rank must enter the block.

    Args:
        ranks: rank and world size of this process.
        consequence: start of the error message on the ranks whose block did not fail.

    Raises:
        Exception: the exception that the block raised on this rank.
        RuntimeError: if the block failed on another rank but not on this one.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  # all ranks must learn of any error
        failure = error
    texts = _gather(failure and f"{type(failure).__name__}: {failure}", ranks)
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text:
            raise RuntimeError(f"{consequence} because rank {rank} failed: {text}")


def _gather(value: Any, ranks: Ranks) -> list[Any]:
    values = [value] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(values, value, group=ranks.control_group)
    return values

"""Warn about a call that waits for other ranks for a long time."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from engine.distributed.ranks import Ranks

__all__ = ["warn_of_long_wait"]

log = logging.getLogger("onecycle")

_PATIENCE = 30.0  # seconds
_PERIOD = 1.0  # seconds between two checks
_waiting: tuple[str, float] | None = None
_thread: threading.Thread | None = None


@contextlib.contextmanager
def warn_of_long_wait(call: str, ranks: Ranks) -> Iterator[None]:
    """Log a warning if the ``with`` block, which waits for other ranks, takes over 30 seconds.

    The most frequent reason is a script that makes a call on rank 0 only. The run is not
    interrupted, because the other ranks may only be slow.

    Args:
        call: name of the call for the message, such as ``report``.
        ranks: rank and world size of this process.
    """
    global _waiting, _thread  # noqa: PLW0603  # one thread watches all engines of the process
    if ranks.world_size == 1:
        yield
        return
    if _thread is None or not _thread.is_alive():  # a forked process has no thread
        _thread = threading.Thread(target=_watch, name="onecycle-waiting", daemon=True)
        _thread.start()
    before, _waiting = _waiting, (call, time.monotonic())
    try:
        yield
    finally:
        _waiting = before


def _watch() -> None:
    """Check once per second how long the current call has been waiting, and warn once."""
    warned = None
    while True:
        time.sleep(_PERIOD)
        found = _waiting
        if found is None or found == warned or time.monotonic() - found[1] < _PATIENCE:
            continue
        warned = found
        log.warning(
            "`%s` has been waiting for other ranks for %g seconds; if only some ranks call it, "
            "move it outside of the `if rank == 0` block",
            found[0],
            _PATIENCE,
        )

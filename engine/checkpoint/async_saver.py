"""Finish a checkpoint in the background while training continues, one at a time."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist

__all__ = ["AsyncSaver"]

log = logging.getLogger("onecycle")


class AsyncSaver:
    """Holds what an asynchronous save needs between two calls: copies, group, thread and failure.

    A process that exits waits for its last checkpoint, and exits with status 1 if it failed.
    """

    def __init__(self) -> None:
        self.arena: dict[str, Any] = {}
        """Host copies of the tensors, whose memory the next save uses again."""
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._group: dist.ProcessGroup | None = None
        atexit.register(self._wait_at_exit)

    def process_group(self, world_size: int) -> dist.ProcessGroup | None:
        """Return a process group for saving only: training's messages would mix with its own."""
        if self._group is None and world_size > 1:
            self._group = dist.new_group(backend="gloo")
        return self._group

    def commit_after(self, written: Future[None], commit: Callable[[], None]) -> None:
        """Call ``commit`` in the background once all files are written."""

        def finish() -> None:
            try:
                written.result()
                commit()
            except Exception as error:  # noqa: BLE001  # raised by the next `wait`
                self._failure = error

        self._thread = threading.Thread(target=finish, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until no checkpoint is being written.

        Raises:
            Exception: the last checkpoint failed with it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait, and release the copies.

        Raises:
            Exception: the last checkpoint failed with it.
        """
        atexit.unregister(self._wait_at_exit)
        self.wait()
        self.arena.clear()

    def _wait_at_exit(self) -> None:
        # Nobody is left to raise to: the exit status has to report the failure.
        try:
            self.wait()
        except Exception as error:
            log.critical("the last checkpoint was not written", exc_info=error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

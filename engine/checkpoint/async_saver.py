"""Write checkpoints in a background thread while training continues."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn

import torch.distributed as dist

from engine.distributed.ranks import Ranks, read_timeout

__all__ = ["AsyncSaver", "exit_with_failure"]

log = logging.getLogger("onecycle")


def exit_with_failure(error: Exception) -> NoReturn:
    """Log that the final save failed, and exit the process with status 1.

    Call this function only while the process is exiting, because it skips the remaining exit
    handlers.
    """
    log.critical("the final checkpoint was not written", exc_info=error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class AsyncSaver:
    """Writer that saves one checkpoint at a time in a background thread.

    At exit, the process waits until the current save has finished. If this save fails, the exit
    status is 1.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Any] = {}
        """Host-memory copies of the tensors to save; the next save reuses their memory."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._group: dist.ProcessGroup | None = None
        atexit.register(self._wait_at_exit)

    def get_process_group(self, ranks: Ranks) -> dist.ProcessGroup | None:
        """Return a gloo process group that is used only for saving, or None if the world size is 1.

        The first call creates the group, so every rank must call this method.
        """
        if self._group is None and ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=read_timeout())
        return self._group

    def commit_after(
        self, written: Future[None], commit: Callable[[], None], discard: Callable[[], None]
    ) -> None:
        """Call ``commit`` in a background thread once all files are written.

        Args:
            written: future that completes when the files of the checkpoint are written.
            commit: function that turns the written files into a complete checkpoint.
            discard: function that deletes the files. It is called if the write or ``commit`` fails.
        """

        def finish() -> None:
            try:
                written.result()
                commit()
            except BaseException as error:  # noqa: BLE001  # the next `wait` raises it
                discard()
                self._failure = error

        self._thread = threading.Thread(target=finish, name="checkpoint")
        self._thread.start()

    @property
    def is_saving(self) -> bool:
        """Whether a save is running."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the current save has finished. Return immediately if no save is running.

        Raises:
            Exception: the exception that the save raised, if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait until the current save has finished, and free the tensor copies in host memory.

        Raises:
            Exception: the exception that the save raised, if it failed.
        """
        atexit.unregister(self._wait_at_exit)
        self.wait()
        self.buffers.clear()

    def _wait_at_exit(self) -> None:
        # No caller is left to catch an exception, so the exit status reports the failure.
        try:
            self.wait()
        except Exception as error:  # noqa: BLE001  # the exit status reports the failure
            exit_with_failure(error)

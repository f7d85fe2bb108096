"""Detect SIGTERM and SIGUSR1, so that a run can save a checkpoint before it is killed."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed.ranks import Ranks

__all__ = ["Signals"]

_NAMES = ("SIGTERM", "SIGUSR1")


class Signals:
    """Records whether this process received SIGTERM or SIGUSR1.

    Slurm can send these signals shortly before it kills a job. Call `is_received_on_any_rank` after
    each step, and `restore_handlers` to stop recording. An instance that is created outside of the
    main thread records nothing, because Python allows signal handlers only in the main thread.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous_handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._previous_handlers[number] = signal.signal(number, self._record)

    def restore_handlers(self) -> None:
        """Restore the signal handlers that were set before, and stop recording."""
        for number, handler in self._previous_handlers.items():
            if signal.getsignal(number) == self._record:
                # None means that the handler was not set by Python code, so it cannot be restored.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous_handlers = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._received = True

    def is_received_on_any_rank(self, ranks: Ranks) -> bool:
        """Return whether any rank received SIGTERM or SIGUSR1.

        Every rank must call this method in the same step.
        """
        if ranks.world_size == 1:
            return self._received
        device = ranks.device if dist.get_backend() == "nccl" else torch.device("cpu")
        received = torch.tensor(int(self._received), device=device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return bool(received)

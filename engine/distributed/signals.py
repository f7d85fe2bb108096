"""Detect SIGTERM and SIGUSR1, so that a run can save a checkpoint before it ends."""

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
    """Records SIGTERM and SIGUSR1 (which Slurm can send before a job ends).

    Recording ends with `forget`. The caller checks after each step whether a signal arrived. Python
    can install signal handlers only in the main thread; in other threads no signal is recorded.
    """

    def __init__(self) -> None:
        self._received = False
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)

    def forget(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                # None means that the handler was not set by Python code, so it cannot be restored.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._received = True

    def came_to_any(self, ranks: Ranks) -> bool:
        """Return whether any rank received a signal; every rank must call this at the same step."""
        if ranks.world_size == 1:
            return self._received
        device = ranks.device if dist.get_backend() == "nccl" else torch.device("cpu")
        received = torch.tensor(int(self._received), device=device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return bool(received)

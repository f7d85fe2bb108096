"""Signals that announce the end: noted when they come, answered at the end of an update."""

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
    """Notes SIGTERM, and SIGUSR1 with which Slurm warns, until it is told to `forget` them.

    Only the main thread can handle signals; elsewhere none are noted.
    """

    def __init__(self) -> None:
        self._came = False
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)

    def forget(self) -> None:
        """Put back what handled them before: from now on nobody asks."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                # None: it was none of Python's, and cannot be put back.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._came = True

    def came_to_any(self, ranks: Ranks) -> bool:
        """Return whether any rank got one; all ranks call it at the same update."""
        if ranks.world_size == 1:
            return self._came
        device = ranks.device if dist.get_backend() == "nccl" else torch.device("cpu")
        came = torch.tensor(int(self._came), device=device)
        dist.all_reduce(came, op=dist.ReduceOp.MAX)
        return bool(came)

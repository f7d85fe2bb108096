"""Detect signals that ask a run to stop, so that it can save a checkpoint before it exits."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed.ranks import Ranks

__all__ = ["Signals"]

log = logging.getLogger("onecycle")

_NAMES = ("SIGUSR1", "SIGTERM", "SIGINT")
"""Handled signals in ascending priority. If several are received, the highest priority wins."""
_MAX_STEP_TIME = 60.0
"""Longest expected training step, in seconds.

If `find_on_any_rank` has not been called for this long, the script is assumed not to be training.
"""
_MAX_DUPLICATE_TIME = 5.0
"""Seconds after the first signal during which a SIGTERM is assumed to be a duplicate.

For example, Slurm signals all processes of a job, and torchrun then signals the ranks again.
"""


class Signals:
    """A record of the SIGINT, SIGTERM and SIGUSR1 signals that this process receives.

    Slurm can send SIGTERM or SIGUSR1 shortly before it kills a job. Call `find_on_any_rank` after
    each step, and `restore_handlers` to stop recording.

    After a first SIGINT (Ctrl-C) or SIGTERM, another SIGINT raises KeyboardInterrupt, and another
    SIGTERM kills the process. The user can therefore stop a script that does not reach the next
    step, for example during a long evaluation. If no step has finished in the past minute, even the
    first SIGINT raises KeyboardInterrupt. SIGUSR1 does not count as a first signal, because it only
    announces that the job will end soon.

    An instance that is created outside the main thread records nothing, because Python allows
    only the main thread to set signal handlers.
    """

    def __init__(self) -> None:
        self._received = 0  # 1 + index in _NAMES
        self._started: tuple[torch.Tensor, Any] | None = None  # maximum over the ranks, in progress
        self._last_check = -_MAX_STEP_TIME
        self._received_at = math.inf  # time of the first SIGTERM or SIGINT
        self._previous_handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                if hasattr(signal, name):  # SIGUSR1 does not exist on Windows
                    number = getattr(signal, name)
                    self._previous_handlers[number] = signal.signal(number, self._record)

    def restore_handlers(self) -> None:
        """Stop recording signals, and restore the previous signal handlers."""
        for number, handler in self._previous_handlers.items():
            if signal.getsignal(number) == self._record:
                # None means that the handler was not set by Python code, so it cannot be restored.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous_handlers = {}

    def call_script_handler(self) -> None:
        """Call the handler that the script had set for the signal that this process received.

        The handler may raise an exception, such as SystemExit. Nothing is called if the script had
        set no handler, or if only other ranks received a signal.
        """
        if self._received:
            self._call_previous_handler(getattr(signal, _NAMES[self._received - 1]))

    def _call_previous_handler(self, number: int) -> None:
        handler = self._previous_handlers.get(number)
        if isinstance(owner := getattr(handler, "__self__", None), Signals):  # another engine
            owner._call_previous_handler(number)  # noqa: SLF001  # the same class
        elif callable(handler) and handler is not signal.default_int_handler:
            handler(number, None)

    def _warn_of_replaced_handlers(self) -> None:
        for number in self._previous_handlers:
            handler = signal.getsignal(number)
            is_own = isinstance(getattr(handler, "__self__", None), Signals)  # of any engine
            # Jupyter sets Python's default handlers before each cell.
            if not is_own and handler not in {signal.SIG_DFL, signal.default_int_handler}:
                name = signal.Signals(number).name
                log.warning(
                    "the script has replaced the run's handler for %s, so %s does not save a "
                    "checkpoint; set the script's handler before calling `initialize`, and it is "
                    "called after the checkpoint is saved",
                    name,
                    name,
                )

    def _record(self, number: int, frame: FrameType | None) -> None:
        del frame
        name, now = signal.Signals(number).name, time.monotonic()
        is_training = now - self._last_check < _MAX_STEP_TIME
        if name == "SIGINT" and (self._received_at < now or not is_training):
            raise KeyboardInterrupt
        if name == "SIGTERM" and now - self._received_at > _MAX_DUPLICATE_TIME:
            log.warning("received a second SIGTERM; exiting without saving a checkpoint")
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if name == "SIGINT":
            log.warning(
                "saving a checkpoint after this step; press Ctrl-C again to stop immediately"
            )
        if name != "SIGUSR1":
            self._received_at = min(self._received_at, now)
        self._received = max(self._received, 1 + _NAMES.index(name))

    def find_on_any_rank(self, ranks: Ranks, *, is_deferred: bool = False) -> str | None:
        """Return the name of a signal that any rank has received, or None if there is none.

        Every rank must call this method in the same step.

        Args:
            ranks: rank and world size of this process.
            is_deferred: whether to return the result of the previous call, so that the ranks do not
                wait for each other. For a single process, this argument has no effect.
        """
        if self._last_check < 0:  # the first call
            self._warn_of_replaced_handlers()
        self._last_check = time.monotonic()
        received = self._received
        if ranks.world_size > 1:
            started = self._start_maximum(received, ranks)
            finished = self._started if is_deferred else started
            self._started = started if is_deferred else None
            received = 0
            if finished is not None:
                highest, work = finished
                work.wait()
                received = int(highest.numpy())  # in host memory: no device is involved
        return _NAMES[received - 1] if received else None

    def _start_maximum(self, received: int, ranks: Ranks) -> tuple[torch.Tensor, Any]:
        highest = torch.tensor(received, device="cpu")
        group = ranks.control_group  # NCCL does not support tensors in host memory
        return highest, dist.all_reduce(highest, dist.ReduceOp.MAX, group=group, async_op=True)

"""Measure the time of the forward pass, the backward pass and the optimizer step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["PassTimer", "read_clock"]

P = ParamSpec("P")
R = TypeVar("R")


def read_clock(device: torch.device) -> float:
    """Wait until a device has finished its work, and return the current time in seconds."""
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


class PassTimer:
    """Timer that measures the mean time of function calls on a device.

    Args:
        device: device that is synchronized before and after each measured call.

    >>> timer = PassTimer(torch.device("cpu"))
    >>> double = timer.measure("double", lambda x: 2 * x)
    >>> double(2), timer.pop_means().keys(), timer.pop_means()
    (4, dict_keys(['double']), {})
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._totals: dict[str, tuple[float, int]] = {}  # seconds and number of calls

    def measure(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """Wrap a function so that its calls are timed, except while gradients are disabled.

        Args:
            name: key of the function in the result of `pop_means`.
            function: function to measure. A call that raises an exception is not measured.
        """

        @functools.wraps(function)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.is_grad_enabled():  # an evaluation
                return function(*args, **kwargs)
            start = read_clock(self._device)
            result = function(*args, **kwargs)
            seconds, calls = self._totals.get(name, (0.0, 0))
            self._totals[name] = seconds + read_clock(self._device) - start, calls + 1
            return result

        return measured

    def pop_means(self) -> dict[str, float]:
        """Return the mean time per call of each function, in milliseconds, and reset the timer."""
        totals, self._totals = self._totals, {}
        return {name: 1000 * seconds / calls for name, (seconds, calls) in totals.items()}

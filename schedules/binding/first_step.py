"""Check that the optimizer takes its first step before the schedule does."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import Optimizer

__all__ = ["FirstStep"]


class FirstStep:
    """A check that `optimizer.step()` is called before `scheduler.step()`, as in PyTorch.

    Args:
        optimizer: optimizer to observe. None disables the check.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self._is_taken = True
        self._handle: Any = None
        # Wrappers of an optimizer, such as Accelerate's, may not have hooks.
        if optimizer is not None and hasattr(optimizer, "_optimizer_step_post_hooks"):
            self._is_taken = False
            self._handle = optimizer.register_step_post_hook(self._note)

    def _note(self, *_: object) -> None:
        self._is_taken = True

    def check(self, stack_level: int) -> None:
        """Warn if the optimizer has not taken a step yet. Only the first call can warn.

        Args:
            stack_level: level of the warning, as in `warnings.warn`.
        """
        is_taken = self._is_taken
        self.cancel()
        if not is_taken:
            warnings.warn(
                "`scheduler.step()` was called before the first `optimizer.step()`, so the first "
                "value of the schedule is not used. Call `optimizer.step()` first.",
                stacklevel=stack_level,
            )

    def cancel(self) -> None:
        """Stop observing the optimizer, so that `check` does not warn."""
        self._is_taken = True
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

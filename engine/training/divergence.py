"""End a run after too many consecutive steps with non-finite gradients."""

from __future__ import annotations

from torch import Tensor

from engine.training.progress import Counters

__all__ = ["DivergenceCheck"]


class DivergenceCheck:
    """Counter of consecutive skipped steps that raises an error when it reaches a limit.

    Args:
        limit: number of consecutive skipped steps after which the run ends; None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.last_loss: Tensor | float | None = None
        """The most recent loss on this rank, for the error message."""
        self._limit = limit
        self._skipped = 0

    def update(self, counters: Counters, lr: float) -> None:
        """Count a skipped step, or reset the count after an applied step.

        Raises:
            FloatingPointError: the number of consecutive skipped steps has reached the limit.
        """
        self._skipped = 0 if counters.applied else self._skipped + 1
        if self._limit is None or self._skipped < self._limit:
            return
        loss = "" if self.last_loss is None else f", loss {float(self.last_loss):g}"
        raise FloatingPointError(
            f"Training has diverged: the gradients of the last {self._limit} steps are not finite "
            f"(step {counters.global_steps}{loss}, lr {lr:g}). Check the data and the model for "
            "NaN, lower the learning rate, or use bf16 instead of fp16. To allow more consecutive "
            "skipped steps, increase `engine.max_skipped_steps`."
        )

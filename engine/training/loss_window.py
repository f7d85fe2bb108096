"""Validate the loss, and average it over the micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LossWindow", "check_loss"]


def check_loss(loss: object) -> None:
    """Check that a loss is a scalar tensor that requires grad.

    Raises:
        ValueError: if the loss is not a scalar tensor that requires grad.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return
    shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise ValueError(
        f"`loss` must be a scalar tensor that requires grad, got {shown}"
        f"{'' if getattr(loss, 'requires_grad', True) else ' that does not require grad'}. "
        "Compute a scalar, for example with `loss.mean()`, outside of `torch.no_grad()`."
    )


class LossWindow:
    """Losses of the micro-batches since the last optimizer step.

    Args:
        average: function that averages a number over all ranks.
        is_kept: whether to keep the losses, for example for an LR range test, a monitor, or a
            schedule that depends on the loss.
    """

    def __init__(self, average: Callable[[float], float], *, is_kept: bool) -> None:
        self.is_kept = is_kept
        self._average = average
        self._losses: list[Tensor] = []
        self._mean: float | None = None

    def add(self, loss: Tensor) -> None:
        """Add the detached loss of a micro-batch. If `is_kept` is False, do nothing."""
        if self.is_kept:
            self._losses.append(loss)

    @property
    def has_losses(self) -> bool:
        """Whether a loss has been added since the last optimizer step.

        If the script calls ``loss.backward()`` itself, no loss is added.
        """
        return bool(self._losses)

    def mean(self) -> float:
        """Return the mean loss over micro-batches and ranks. Every rank must call this method.

        Raises:
            RuntimeError: if no loss has been added since the last optimizer step.
        """
        if not self._losses:
            raise RuntimeError(
                "The schedule or the LR range test needs the loss, but the script called "
                "`loss.backward()` directly. Call `trainer.backward(loss)` instead."
            )
        if self._mean is None:
            self._mean = self._average(float(torch.stack(self._losses).float().mean()))
        return self._mean

    @property
    def count(self) -> int:
        """The number of losses added since the last optimizer step."""
        return len(self._losses)

    def compute_local_mean(self) -> Tensor | None:
        """Return the mean of this rank's losses, or None if there are no losses.

        The mean is a tensor on the same device as the losses.
        """
        return torch.stack(self._losses).float().mean() if self._losses else None

    def set_mean(self, mean: float) -> None:
        """Make the `mean` method return a value that was computed elsewhere."""
        self._mean = mean

    def renew(self) -> LossWindow:
        """Return an empty window with the same settings."""
        return LossWindow(self._average, is_kept=self.is_kept)

    def clear(self) -> None:
        """Remove all losses."""
        if self._losses:
            self._losses.clear()
            self._mean = None

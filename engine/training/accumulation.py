"""Track gradient accumulation: count micro-batches, and detect the end of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import MisuseError

__all__ = ["Accumulation"]


@dataclass
class Accumulation:
    """Counter of the micro-batches since the last optimizer step.

    >>> accumulation = Accumulation(steps=2)
    >>> accumulation.is_boundary()
    False
    >>> accumulation.micro_batches = 1
    >>> accumulation.is_boundary()
    True
    """

    steps: int
    """Number of micro-batches per optimizer step."""
    micro_batches: int = 0
    """Number of micro-batches since the last optimizer step."""
    scaled_losses: int = 0
    """Number of losses passed to `backward` or `scale` since the last optimizer step."""
    boundary: bool | None = None
    """Value set by `Engine.set_gradient_accumulation_boundary`; None to count micro-batches."""
    has_gradients: bool = False
    """Whether earlier micro-batches of the current batch left a gradient in any parameter."""
    is_managed: bool = True
    """Whether micro-batches are counted; if false, every call to `step` completes a batch."""
    averages_gradients: bool = True
    """Whether backward passes average gradients across ranks; false inside `no_sync`."""
    is_coalescing: bool = False
    """Whether DeepSpeed's `coalesce_grad_reduction` is active."""

    def is_boundary(self) -> bool:
        """Return whether the next micro-batch completes a batch."""
        if not self.is_managed:
            return True
        if self.boundary is not None:
            return self.boundary
        return (self.micro_batches + 1) % self.steps == 0

    def set_boundary(self, is_boundary: bool) -> None:
        """Set whether the next calls to `step` take optimizer steps.

        Afterward, the number of micro-batches no longer determines when a batch is complete.

        Raises:
            RuntimeError: ``managed_gradient_accumulation`` is false, so every call to `step` takes
                an optimizer step.
        """
        if not self.is_managed:
            raise MisuseError(
                "`set_gradient_accumulation_boundary()` must not be called if "
                "`managed_gradient_accumulation` is false, because every `step()` call then takes "
                "an optimizer step. Call `step()` only after the last micro-batch of each batch, "
                "or remove `managed_gradient_accumulation` from the config."
            )
        self.boundary = is_boundary

    def is_last_backward(self) -> bool:
        """Return whether the next backward pass ends a batch and averages gradients over ranks."""
        return self.averages_gradients and self.is_boundary()

    def restart(self, micro_batches: int = 0) -> None:
        """Reset the counts, for example when a checkpoint is loaded.

        Args:
            micro_batches: total number of micro-batches in the run so far, to continue an
                unfinished batch; 0 to start a new batch.
        """
        self.micro_batches = micro_batches % self.steps if self.is_managed else 0
        self.scaled_losses = 0
        self.has_gradients = False

    def check_between_steps(self) -> None:
        """Check that no batch is in progress, so that an LR range test can start.

        Raises:
            ValueError: some of the current batch's micro-batches have already been processed.
        """
        if self.micro_batches or self.scaled_losses:
            raise ValueError(
                "An LR range test must not start in the middle of a batch. Train on the remaining "
                "micro-batches of the batch first."
            )

    @contextlib.contextmanager
    def no_sync(self, zero_stage: int) -> Iterator[None]:
        """Disable gradient averaging across ranks inside this context; see `Engine.no_sync`.

        Raises:
            RuntimeError: the ZeRO stage is 2 or 3, or this context or `coalesce` is already active.
        """
        if zero_stage >= 2:
            raise MisuseError(
                "`no_sync()` must not be used with ZeRO stage 2 or 3, because each backward pass "
                "must average the gradients across ranks to shard them. Use "
                "`gradient_accumulation_steps` instead."
            )
        if not self.averages_gradients or self.is_coalescing:
            raise MisuseError(
                "`no_sync()` must not be nested in `no_sync()` or `coalesce_grad_reduction()`. "
                "Exit the outer context first."
            )
        self.averages_gradients = False
        try:
            yield
        finally:
            self.averages_gradients = True

    @contextlib.contextmanager
    def coalesce(self) -> Iterator[None]:
        """Mark `Engine.coalesce_grad_reduction` as active inside this context.

        Raises:
            RuntimeError: `no_sync` is active.
        """
        if not self.averages_gradients:
            raise MisuseError(
                "`coalesce_grad_reduction()` must not be nested in `no_sync()`. Exit the outer "
                "context first."
            )
        was_coalescing, self.is_coalescing = self.is_coalescing, True
        try:
            yield
        finally:
            self.is_coalescing = was_coalescing

"""What an engine asks of the library that trains underneath."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.distributed.ranks import Ranks

__all__ = ["DTYPES", "Backend"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What a precision computes in, where it is not float32."""


class Backend(Protocol):
    """A model and an optimizer at work on one or many ranks, in one precision."""

    ranks: Ranks
    model: nn.Module
    """The user's own module, on its device, not wrapped."""
    optimizer: Optimizer
    """What the schedule drives, and what updates the parameters."""
    basic_optimizer: Optimizer
    """The one of these parameters, without what a library has wrapped around it."""
    trained: int
    """How many numbers are updated, over all ranks."""
    grad_norm: float | None
    """2-norm of all gradients of the last update, before clipping; None before the first."""

    def forward(self, *args: Any, last_micro_batch: bool, **kwargs: Any) -> Any:
        """Call the model in the run's precision; ranks meet only in the last micro-batch."""
        ...

    def backward(self, loss: Tensor, accumulation: int, *, retain_graph: bool = False) -> None:
        """Add the gradients of a loss, divided by the number of losses that an update averages."""
        ...

    def scale(self, loss: Tensor, accumulation: int) -> Tensor:
        """Return a loss whose own ``.backward()`` adds what `backward` would have added."""
        ...

    def step(self, *, divide_by: int = 1) -> bool:
        """Clip the gradients, update and clear them; return whether the update was applied.

        Args:
            divide_by: what the gradients are to be divided by first, where `backward` has not.
        """
        ...

    def zero_grad(self) -> None:
        """Drop the gradients."""
        ...

    @property
    def loss_scale(self) -> float:
        """The factor on the loss that the next backward pass uses."""
        ...

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        ...

    def mean(self, value: float) -> float:
        """Return the mean of a number over the ranks."""
        ...

    def save(self, place: Path, *, frozen: bool = True) -> None:
        """Write model, optimizer and loss scale into a folder; every rank calls it.

        Args:
            place: the folder.
            frozen: whether parameters that need no gradients are written as well.
        """
        ...

    def save_behind(
        self,
        place: Path,
        group: dist.ProcessGroup | None,
        arena: dict[str, Any],
        *,
        frozen: bool = True,
    ) -> Future[None]:
        """Do what `save` does while training goes on; at the most one at a time.

        Raises:
            ValueError: this backend cannot.
        """
        ...

    def load(self, place: Path, *, optimizer: bool, strict: bool, frozen: bool = True) -> None:
        """Restore what `save` wrote, with or without the optimizer's part; every rank calls it.

        Args:
            place: the folder.
            optimizer: whether to restore the optimizer and the loss scale.
            strict: whether the model must have all that was saved.
            frozen: whether parameters that need no gradients were saved; else they stay as they
                are.

        Raises:
            CheckpointError: it is another model's.
        """
        ...

    def snapshot(self) -> Any:
        """Return a copy of all that training changes, for `restore`; every rank calls it."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Put everything back, bit for bit; every rank calls it."""
        ...

    def describe(self) -> str:
        """Return what trains here, in words, for the log."""
        ...

    def attribute(self, name: str) -> Any:
        """Return what an engine has under a name that is not its own.

        Raises:
            AttributeError: there is nothing of that name.
        """
        ...

    def destroy(self) -> None:
        """Let go of what would keep memory or hooks."""
        ...

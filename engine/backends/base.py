"""What an engine asks of the library that trains underneath."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from engine.ranks import Ranks

__all__ = ["Backend"]


class Backend(Protocol):
    """A model and an optimizer at work on one or many ranks, in one precision."""

    ranks: Ranks
    model: nn.Module
    """The user's own module, on its device, not wrapped."""
    optimizer: Optimizer
    grad_norm: float | None
    """2-norm of all gradients of the last update, before clipping; None before the first."""

    def forward(self, *args: Any, last_micro_batch: bool, **kwargs: Any) -> Any:
        """Call the model in the run's precision; ranks meet only in the last micro-batch."""
        ...

    def backward(self, loss: Tensor, accumulation: int) -> None:
        """Add the gradients of a loss, divided by the number of losses that an update averages."""
        ...

    def step(self) -> bool:
        """Clip the gradients, update and clear them; return whether the update was applied."""
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

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimizer and loss scale, which are the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any], *, optimizer: bool = True) -> None:
        """Restore what `state_dict` returned, with or without the optimizer's part."""
        ...

    def describe(self) -> str:
        """Return what trains here, in words, for the log."""
        ...

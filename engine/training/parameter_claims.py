"""Detect engines and optimizers that train the same parameters as another engine."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["EngineSteps", "ParameterClaim", "can_change_weights"]

log = logging.getLogger("onecycle")


class EngineSteps:
    """Count of the engines that are in an optimizer step, to tell their steps from the script's."""

    active = 0  # of all engines, because two engines may share an optimizer


class ParameterClaim:
    """The parameters that an engine trains, and the other engines that train any of them.

    Args:
        parameters: parameters that the engine trains.
        optimizer: optimizer of the engine; None to ignore the steps of the script's optimizers.
        is_main: whether this process logs warnings.
    """

    def __init__(self, parameters: set[Any], optimizer: Any, *, is_main: bool) -> None:
        self.parameters = parameters
        self.steps = 0
        """Number of steps that the engine has taken."""
        self._optimizer = optimizer
        self._is_main = is_main
        self._other_steps = 0  # of the script's own optimizers
        self._has_warned = False
        shares = [each for each in _CLAIMS if not each.parameters.isdisjoint(parameters)]
        self.rivals = weakref.WeakSet(shares)
        for rival in shares:
            rival.rivals.add(self)
        _CLAIMS.add(self)
        if not _HANDLES:
            _HANDLES.append(register_optimizer_step_post_hook(_check_optimizer))

    def release(self) -> None:
        """Let the script train the parameters with its own optimizers."""
        _CLAIMS.discard(self)

    def forget_rivals(self) -> None:
        """Unlink this engine from the other engines that share parameters with it."""
        for rival in list(self.rivals):
            rival.rivals.discard(self)
        self.rivals.clear()

    def note_other_step(self, optimizer: Optimizer) -> None:
        """Log a warning at the second step that the script's own optimizers take.

        Some scripts take one step to create the optimizer state.
        """
        if self._optimizer is None or optimizer is self._optimizer or self._has_warned:
            return
        stepped = (each for each in _iterate_parameters(optimizer) if each.grad is not None)
        if not any(each in self.parameters for each in stepped):
            return
        self._other_steps += 1
        self._has_warned = self._other_steps > 1
        if self._has_warned and self._is_main:
            log.warning(
                "the script's own %s optimizer steps parameters that the engine trains, without "
                "the engine's schedule and checkpoints; call `trainer.backward(loss)` and "
                "`trainer.step()` instead of `loss.backward()` and `optimizer.step()`, and to use "
                "your own optimizer, pass it to `initialize`",
                type(optimizer).__name__,
            )


_CLAIMS: weakref.WeakSet[ParameterClaim] = weakref.WeakSet()
_HANDLES: list[Any] = []  # of the hook that is called after the step of any optimizer


def _check_optimizer(optimizer: Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling() or EngineSteps.active or not _CLAIMS:
        return
    if not can_change_weights(optimizer):
        return
    for claim in list(_CLAIMS):
        claim.note_other_step(optimizer)


def can_change_weights(optimizer: Optimizer) -> bool:
    """Return whether a step can change weights.

    Some steps only create the optimizer state: torch.distributed.checkpoint takes steps with a
    learning rate of 0, and some scripts take a step without gradients.
    """
    lrs = (group.get("lr") for group in optimizer.param_groups)
    # Reading a tensor would wait for the device.
    can_change = any(isinstance(lr, Tensor) or lr != 0 for lr in lrs)
    return can_change and any(each.grad is not None for each in _iterate_parameters(optimizer))


def _iterate_parameters(optimizer: Optimizer) -> Iterator[Any]:
    return (each for group in optimizer.param_groups for each in group["params"])

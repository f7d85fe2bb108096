"""Detect engines and optimizers that train the same parameters as another engine."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from engine.errors import MisuseError

__all__ = ["EngineSteps", "ParameterClaim", "can_change_weights"]

log = logging.getLogger("onecycle")


class EngineSteps:
    """Count of the engines that are in an optimizer step, to tell their steps from the script's."""

    active = 0  # of all engines, because two engines may share an optimizer


class ParameterClaim:
    """The parameters that an engine trains, and the other engines that train any of them.

    Args:
        parameters: parameters that the engine trains.
        optimizer: optimizer of the engine; None if the script may train them with its own.
        is_main: whether this process logs warnings.
    """

    def __init__(self, parameters: set[Any], optimizer: Any, *, is_main: bool) -> None:
        self.parameters = parameters
        self.steps = 0
        """Number of steps that the engine has taken."""
        self._optimizer = optimizer
        self._is_main = is_main
        self._other_steps = 0  # of the script's own optimizers
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
        """Check a step of one of the script's optimizers.

        Raises:
            MisuseError: the optimizer has taken a second step on the engine's parameters, although
                the engine has taken none.
        """
        parameters = (
            parameter for group in optimizer.param_groups for parameter in group["params"]
        )
        is_own = self._optimizer is None or optimizer is self._optimizer
        if is_own or not any(parameter in self.parameters for parameter in parameters):
            return
        self._other_steps += 1
        text = (
            f"The script's own {type(optimizer).__name__} optimizer steps parameters that the "
            "engine trains, without the engine's schedule and checkpoints. Call "
            "`trainer.backward(loss)` and `trainer.step()` instead of `loss.backward()` and "
            "`optimizer.step()`. To train with this optimizer, pass it to `initialize`."
        )
        # Some scripts take one step to create the optimizer state.
        if self._other_steps > 1 and self.steps == 0:
            raise MisuseError(text)
        if self._other_steps == 1 and self.steps > 0 and self._is_main:
            log.warning("%s", text)


_CLAIMS: weakref.WeakSet[ParameterClaim] = weakref.WeakSet()
_HANDLES: list[Any] = []  # of the hook that is called after the step of any optimizer


def _check_optimizer(optimizer: Optimizer, *_: object) -> None:
    if EngineSteps.active or not _CLAIMS or not can_change_weights(optimizer):
        return
    for claim in list(_CLAIMS):
        claim.note_other_step(optimizer)


def can_change_weights(optimizer: Optimizer) -> bool:
    """Return whether a step can change weights.

    Some steps only create the optimizer state: torch.distributed.checkpoint takes steps with a
    learning rate of 0, and some scripts take a step without gradients.
    """
    groups = optimizer.param_groups
    lrs = (group.get("lr") for group in groups)
    # Reading a tensor would wait for the device.
    can_change = any(isinstance(lr, Tensor) or lr != 0 for lr in lrs)
    return can_change and any(p.grad is not None for group in groups for p in group["params"])

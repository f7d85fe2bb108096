"""The scheduler interface of PyTorch and DeepSpeed, as a base class of `ScheduleBinder`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from schedules.binding.saved_state import build_identity, complete_base
from schedules.binding.writers import RangeWriter
from schedules.core.controller import Base, Controller, OpenLoop, Values
from schedules.core.durations import Horizon
from schedules.core.html import draw_html
from schedules.core.schedule import Schedule
from schedules.param_groups import Slot, read_lr, read_momenta

__all__ = ["BaseLRs", "TorchInterface"]


class BaseLRs(list[float | Tensor]):
    """List of the initial learning rates. Assigning to one of its items raises an error."""

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(
            "The items of `base_lrs` cannot be changed. Assign a new list to `base_lrs`."
        )


class TorchInterface(LRScheduler):
    """Base class of `ScheduleBinder`, with the attributes of PyTorch's `LRScheduler`."""

    schedule: Schedule[Any]
    controller: Controller[Any]
    _horizon: Horizon | None
    before_use: Callable[[], None] | None = None
    """Function to call at the start of methods such as `get_last_lr`. The engine sets a function
    that completes a deferred step."""
    _extra_count = 0
    _stack_level = 4
    """Number of calls between the script's call to `step` and the warning of a method."""
    _losses: tuple[float, ...] = ()
    """Losses passed to `record_loss` since the previous call to `step`."""
    _position: int
    """Number of steps that a feedback schedule has taken. If `last_epoch` differs from it, a script
    has changed `last_epoch`."""
    last_epoch: int
    """Number of optimizer steps so far, not counting skipped steps. As in PyTorch, a script can set
    it, and the next `step` continues from there. For a feedback schedule, the next `step` raises an
    error instead."""
    _base: Base
    _base_lrs: BaseLRs
    _doubt: str | None
    """Why the initial hyperparameters are uncertain; None if they are known."""
    _writer: RangeWriter | None
    """Writer that the fast path of `step` uses until a curve's formula changes; None if the next
    step must take the slow path."""
    _slots: Mapping[str, Sequence[Slot]]

    @property
    @abstractmethod
    def state(self) -> Any:
        """State of the controller. It is replaced at each step, never modified in place."""

    @abstractmethod
    def _bind(self, base: Base) -> None:
        """Build the controller for the initial hyperparameters."""

    @abstractmethod
    def write(self) -> None:
        """Set the optimizer's hyperparameters for its next step."""

    @abstractmethod
    def _go_to(self, state: Any, step: int, write: bool = True) -> None:
        """Set the schedule's state and step; if ``write`` is true, also update the optimizer."""

    def _prepare_use(self) -> None:
        if self.before_use is not None:
            self.before_use()

    # PyTorch's SequentialLR calls `_initial_step` of its first scheduler, and it calls
    # `_update_lr(0)` of every other scheduler at the milestone at which that scheduler starts.
    def _initial_step(self) -> None:
        self._doubt = None  # the scheduler that calls this starts from the initial values
        self._go_to(self.controller.init(), 0)

    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is None:
            self.step()
            return
        if epoch != 0:
            raise ValueError(
                f"`epoch` must be 0, got {epoch}. To go to another step, call load_state_dict()."
            )
        self._initial_step()

    @property
    def base_lrs(self) -> list[float | Tensor]:
        """Initial learning rate of each param group. To change a value, assign a new list."""
        return self._base_lrs

    @base_lrs.setter
    def base_lrs(self, lrs: list[float | Tensor]) -> None:
        given = complete_base([float(lr) for lr in lrs], len(self._base["lr"]))
        self._bind({**self._base, **given})
        self._writer = self._doubt = None

    @property
    def _last_lr(self) -> list[float | Tensor]:  # type: ignore[override]  # read-only here
        return self.get_last_lr()

    @property
    def _step_count(self) -> int:
        # PyTorch's constructors also take a step.
        return self.last_epoch + 1 + self._extra_count

    @_step_count.setter
    def _step_count(self, count: int) -> None:
        # Accelerate counts the steps in which gradients are only accumulated.
        self._extra_count = count - self.last_epoch - 1

    @property
    def identity(self) -> dict[str, Any]:
        """Type and parameters of the schedule, with durations in steps.

        By default, `load_state_dict` accepts only states with the same type and parameters.
        A duration such as "1dur" depends on the length of the run, so durations are compared in
        steps.
        """
        return build_identity(self.schedule, self._horizon)

    @property
    def length(self) -> int | None:
        """Number of steps after which the schedule ends; None if it never ends."""
        length = self.schedule.resolve(self._horizon).length
        ratio = self._horizon.scale_ratio if self._horizon is not None else 1.0
        if length is None or not self.schedule.has_rate_per_step:
            return length
        return math.ceil(length * ratio)

    def __repr__(self) -> str:
        lrs = ", ".join(f"{lr:.4g}" for lr in self.get_last_lr())
        return f"{type(self).__name__}({self.schedule!r}, step={self.last_epoch}, lr=[{lrs}])"

    def _repr_html_(self) -> str:
        """Return HTML with the repr and small plots of the schedule, for display in notebooks.

        A vertical line marks the current step. There is no plot if the schedule depends on the loss
        or on a metric.
        """
        if not isinstance(self.controller, OpenLoop):
            return draw_html(repr(self), {}, 1)
        known = self._horizon.scaled_steps if self._horizon is not None else None
        steps = int(known or self.schedule.resolve(self._horizon).span)
        step = self.last_epoch
        return draw_html(repr(self), self.controller.curves, max(steps, step + 1), step)

    def record_loss(self, loss: Tensor | float) -> None:
        """Record a loss for the next call to `step`, which uses the mean of the recorded losses.

        Use this method with a trainer that calls `step` without a loss, such as Hugging Face's
        ``Trainer``. In a custom training loop, call ``step(loss)`` instead. This method has no
        effect if the schedule does not depend on the loss.

        Args:
            loss: loss of a micro-batch, as a number or a scalar tensor.

        Raises:
            ValueError: the loss is not a single number.

        >>> import torch, schedules
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> scheduler = schedules.attach("AutoWU", optimizer, steps_per_epoch=5, total_epochs=20)
        >>> for loss in (2.5, 2.4):
        ...     scheduler.record_loss(loss)
        >>> optimizer.step()
        >>> scheduler.step()
        """
        if self.schedule.feedback == "loss":
            self._losses += (_read_loss(loss),)

    def _take_loss(self, loss: Tensor | float | None) -> float | None:
        """Return the mean of the recorded losses, and discard them.

        If no loss was recorded, return ``loss``.
        """
        losses = self._losses
        if losses and loss is not None:
            raise ValueError(
                f"`loss` must be omitted after record_loss(), got {float(loss):g}. Pass the loss "
                "only once."
            )
        self._losses = ()
        if losses:
            return sum(losses) / len(losses)
        return None if loss is None else _read_loss(loss)

    def _check_position(self) -> None:
        """Raise an error if the schedule needs feedback and a script has set `last_epoch`."""
        if self.schedule.feedback is not None and self.last_epoch != self._position:
            raise ValueError(
                f"`last_epoch` must be the number of steps taken ({self._position}), got "
                f"{self.last_epoch}. {self.schedule.type_name} depends on the "
                f"{self.schedule.feedback} of each step. Call step() once per optimizer step "
                "instead of setting `last_epoch`. To go to another step, call load_state_dict() "
                "with a saved state."
            )

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each param group for the next step."""
        self._prepare_use()
        return list(read_lr(self.optimizer))

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each param group at step `last_epoch`."""
        self._prepare_use()
        self._check_position()
        # Ignite sets `last_epoch` and then writes the values that this method returns. As in
        # PyTorch's schedulers, the method then sets the other hyperparameters.
        if self._get_lr_called_within_step:
            self.write()
        values = self._read_values()
        return list(values["lr"]) if "lr" in values else self.get_last_lr()

    def _read_values(self) -> Values:
        """Return the scheduled values at step `last_epoch`; {} before the schedule has started."""
        return self.controller.values(self.state) if self.last_epoch >= 0 else {}

    def get_mom(self) -> list[float | tuple[float, ...]] | None:
        """Return the current momentum, or Adam's betas, of each param group.

        Return None if the schedule does not set the momentum.
        """
        self._prepare_use()
        return read_momenta(self.optimizer) if "momentum" in self._slots else None


def _read_loss(loss: Tensor | float) -> float:
    """Convert a loss or a metric to a float.

    Raises:
        ValueError: the value is a tensor that does not have exactly one element.
    """
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            f"`loss` must be a single number, got a tensor of shape {tuple(loss.shape)}. "
            "Pass its mean."
        )
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)

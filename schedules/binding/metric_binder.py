"""Run a schedule that depends on a metric."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from schedules.binding.binder import ScheduleBinder
from schedules.binding.writers import Change
from schedules.core.controller import Base
from schedules.feedback.base import FeedbackController
from schedules.param_groups import read_lr

__all__ = ["MetricBinder"]

_MANY_STEPS = 1000


class MetricBinder(ScheduleBinder, ReduceLROnPlateau, feedback="metric"):
    """The `ScheduleBinder` for a schedule that depends on a metric.

    It is a subclass of PyTorch's ``ReduceLROnPlateau``, because trainers such as Hugging Face's and
    Lightning's pass a metric only to instances of that class. Like that class, the binder reduces
    the current learning rates by a factor, and leaves them unchanged between two reductions.
    """

    _has_received = False
    _stack_level = 5

    def step(  # type: ignore[override]
        self,
        metrics: Tensor | float | None = None,
        epoch: None = None,
        *,
        metric: Tensor | float | None = None,
        loss: Tensor | float | None = None,
    ) -> None:
        """Pass a metric to the schedule, and set the learning rates if the schedule changes them.

        Args:
            metrics: value of the metric, a number or a scalar tensor; None if there is no value.
            epoch: deprecated argument of PyTorch's schedulers, which is not supported.
            metric: alias of ``metrics``.
            loss: alias of ``metrics``.
        """
        if epoch is not None:
            raise ValueError(
                f"step() must be called without an epoch, got `epoch` {epoch}. Omit the argument: "
                "each call advances the schedule by one step. To go to another step, call "
                "load_state_dict() with a saved state."
            )
        received = next((each for each in (metrics, metric, loss) if each is not None), None)
        super().step(received)
        self._has_received |= received is not None
        if not self._has_received and self.last_epoch == _MANY_STEPS:
            warnings.warn(
                f"{self.schedule.type_name} has not received a metric in {_MANY_STEPS} steps, so "
                "it has not reduced the learning rate. Pass the metric to `step(metric=…)`.",
                stacklevel=2,
            )

    @property
    def state(self) -> Any:
        """State of the schedule, updated with the optimizer's current learning rates."""
        assert isinstance(self.controller, FeedbackController)
        return self.controller.continue_from(self._state, {"lr": tuple(read_lr(self.optimizer))})

    def _find_change(self) -> Change | None:
        change = super()._find_change()
        if change is None:
            return None
        # After the warmup, the schedule multiplies the current values instead of replacing them.
        warmup = getattr(self.schedule.resolve(self._horizon), "warmup_steps", 0)
        return change if self._state.step < warmup else None

    def _is_unchanged_since(self, before: Any) -> bool:
        return self.controller.values(before) == self.controller.values(self._state)

    def _read_base(self, given: Base) -> Base:
        """Return the learning rates that the schedule reduces.

        Without a warmup, these are the current learning rates. With a warmup, they are the initial
        learning rates, which are the target of the warmup.
        """
        if getattr(self.schedule, "warmup_steps", 0):
            return super()._read_base(given)
        return {**super()._read_base({"lr": tuple(read_lr(self.optimizer))}), **given}

    @property
    def _compared(self) -> Collection[str]:
        return ()  # the initial learning rates have no effect

    @property
    def best(self) -> float:  # type: ignore[override]  # read-only here
        """Best value of the metric so far; before the first value, the worst possible value."""
        best: float | None = self._state.plateau.best
        return self.mode_worse if best is None else best

    @property
    def num_bad_epochs(self) -> int:  # type: ignore[override]  # read-only here
        """Number of consecutive metric values without an improvement."""
        return int(self._state.plateau.bad)

    @property
    def cooldown_counter(self) -> int:  # type: ignore[override]  # read-only here
        """Number of metric values left in the current cooldown; 0 outside of a cooldown."""
        return int(self._state.plateau.rests)

    @property
    def mode_worse(self) -> float:  # type: ignore[override]
        """The worst possible value of the metric: inf in mode "min", -inf in mode "max"."""
        return math.inf if self.mode == "min" else -math.inf


def _build_parameter(name: str) -> property:
    """Return the property for a parameter that PyTorch's class has as an attribute."""

    def reject(binder: MetricBinder, value: object) -> None:
        raise AttributeError(
            f"`{name}` of an attached {binder.schedule.type_name} cannot be set, got {value}. "
            f"Attach the schedule again with `{name}={value!r}`. To continue from the metric "
            "values so far, then call "
            "`new_scheduler.load_state_dict(old_scheduler.state_dict(), override=True)`."
        )

    return property(operator.attrgetter(f"schedule.{name}"), reject)


def _reject_state(binder: MetricBinder, value: object) -> None:
    raise AttributeError(
        f"The state of an attached {binder.schedule.type_name} cannot be set, got {value}. To "
        "restart the schedule from the current learning rate, attach it again. To restore an "
        "earlier state, call load_state_dict() with a saved state."
    )


for _name in ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "eps"):
    setattr(MetricBinder, _name, _build_parameter(_name))
for _name in ("best", "num_bad_epochs", "cooldown_counter", "mode_worse"):
    setattr(MetricBinder, _name, getattr(MetricBinder, _name).setter(_reject_state))

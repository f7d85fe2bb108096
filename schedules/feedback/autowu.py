"""AutoWU: the schedule that finds its own warmup, as published and with what it lacked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Literal

from schedules.core.controller import Base
from schedules.core.durations import Horizon
from schedules.core.fields import Range
from schedules.core.schedule import Fault, ScheduleError
from schedules.feedback.autowu_controller import AutoWUController, Decay
from schedules.feedback.autowu_state import AutoWUState, Warmup
from schedules.feedback.base import FeedbackSchedule
from schedules.feedback.warmup_tests import PublishedTest, RobustTest, WarmupTest

__all__ = ["AutoWU"]

Fraction = Annotated[float, Range(above=0, at_most=1), "share of all updates"]
Count = Annotated[int | None, Range(at_least=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoWU(FeedbackSchedule[AutoWUState], example={"steps_per_epoch": 10, "total_epochs": 10}):
    """Warmup until the loss turns, then decay: the maximum learning rate is found, not given.

    The learning rate grows exponentially from ``min_lr`` towards ``max_lr``. A Gaussian
    process on the losses says how probable it is that the lowest has passed; when it is sure, three
    times in a row, the learning rate goes back to that of the minimum and decays from there::

        warmup    lr(k) = min_lr * (max_lr / min_lr) ** (k / W),   W = int(max_warmup_fraction * T)
        cooldown  lr(k) = peak * (1 + cos(pi * n / D)) / 2         n of the D updates that are left

    T is ``steps_per_epoch * total_epochs``. A warmup that is never sure ends at W. The groups keep
    the ratios that they were built with. Past T the last value is held.

    ``"test": "reference"`` decides as the published code does, once an epoch; it needs some thirty
    epochs, and its units are those of the loss. ``"test": "robust"`` looks sixty times in a warmup,
    is free of the loss's scale, survives explosions, and decays from the peak itself.
    ``"rollback": true`` puts weights and optimizer back to the lowest loss at the switch: without
    normalisation layers the learning rates past the minimum can destroy a network.

    The loss is told by `engine.backward`, or in a loop of one's own by ``step(loss=loss)``. What
    `curves` shows is a run on a synthetic loss.

    >>> import torch, schedules
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    >>> scheduler = schedules.attach("AutoWU", optimizer, steps_per_epoch=20, total_epochs=20)
    >>> for _ in range(400):
    ...     lr = scheduler.get_last_lr()[0]
    ...     scheduler.step(loss=1 + 0.3 * torch.tensor(lr / 0.01).log10() ** 2)
    >>> 0.007 < scheduler.decision.lr < 0.014
    True

    Source: Kim et al., https://arxiv.org/abs/2107.05855; github.com/kakaobrain/autowu.
    """

    steps_per_epoch: Count = None
    """Updates in an epoch, after which the reference tests; by default the run's."""
    total_epochs: Count = None
    """Epochs of the run; by default the run's."""
    min_lr: Annotated[float, Range(above=0)] = 1e-5
    """Learning rate of the first update."""
    max_lr: Annotated[float, Range(above=0)] = 1.0
    """Learning rate that the longest warmup would reach."""
    max_warmup_fraction: Annotated[float, Range(at_least=0, at_most=1), "share of all updates"] = (
        0.5
    )
    """How long the warmup may last."""
    warmup_unit: Literal["step", "epoch"] = "step"
    """Whether the learning rate grows at each update, or at the end of each epoch."""
    warmup_type: Literal["exp", "linear"] = "exp"
    """Whether it grows by a factor, or by a difference."""
    immediate_cooldown: bool = False
    """Whether the cooldown follows the warmup at once, without a constant phase."""
    decay_phase_stat: Literal["loss"] | None = None
    """ "loss": the constant phase is lowered by `decay_phase_factor` when the epochs' mean loss has
    not got better for five of them."""
    decay_phase_factor: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Factor on the peak, once, at a switch that a test has made; or see `decay_phase_stat`."""
    cooldown_fraction: Fraction = 0.2
    """Last share of the run, in which the learning rate decays, whatever the phase before."""
    cooldown_type: Literal["cosine", "half_cosine"] = "cosine"
    """Shape of the decay; the half cosine begins at half of the peak."""
    test: Literal["reference", "robust"] = "reference"
    """Which test ends the warmup."""
    rollback: bool = False
    """Whether weights and optimizer go back to those of the lowest loss at the switch."""

    def faults(self) -> Iterator[Fault]:
        if self.min_lr >= self.max_lr:
            bounds = f"{self.max_lr:g}, but is {self.min_lr:g}"
            yield Fault("min_lr", f"`min_lr` must be less than `max_lr`, {bounds}.")

    @property
    def rolls_back(self) -> bool:
        """Whether the engine is to put back weights at the switch."""
        return self.rollback

    @property
    def total_steps(self) -> int:
        """Updates of the run; 100 where it is not known, to be looked at."""
        return (self.steps_per_epoch or 10) * (self.total_epochs or 10)

    @property
    def span(self) -> int:
        return self.total_steps

    def resolve(self, horizon: Horizon | None = None) -> AutoWU:
        """Return the same with the epochs of the run.

        Raises:
            ScheduleError: the reference tests once an epoch, and the run is not of whole ones.
        """
        if horizon is None:
            return self
        steps, epochs = self.steps_per_epoch, self.total_epochs
        in_an_epoch = steps or horizon.steps_per_epoch
        if steps is None and in_an_epoch:
            steps = max(1, int(in_an_epoch))
        if epochs is None and in_an_epoch and horizon.total_steps:
            epochs = max(1, round(horizon.total_steps / in_an_epoch))
            if abs(epochs * in_an_epoch - horizon.total_steps) >= 1:
                if self.test == "reference":
                    message = (
                        "the reference tests once an epoch, so the run must be of whole ones, but "
                        f"is {horizon.total_steps:g} updates of {in_an_epoch:g} in an epoch; give "
                        'another `steps_per_epoch`, or "test": "robust".'
                    )
                    raise ScheduleError(self.type_name, [Fault("steps_per_epoch", message)])
                total = max(1, int(horizon.scaled_steps or 1))
                return dataclasses.replace(self, steps_per_epoch=total, total_epochs=1)
        if epochs is not None and horizon.scale_ratio != 1.0:
            epochs = max(1, int(epochs * horizon.scale_ratio))
        return dataclasses.replace(self, steps_per_epoch=steps, total_epochs=epochs)

    def bind(self, base: Base, horizon: Horizon | None = None) -> AutoWUController:
        """Return the controller; the length of the run must be known.

        Raises:
            ScheduleError: neither the parameters nor the run have it.
        """
        resolved = self.resolve(horizon)
        for name in ("steps_per_epoch", "total_epochs"):
            if getattr(resolved, name) is None:
                message = (
                    f"`{name}` must be known, but neither the parameters nor the run say it. Set "
                    'it, or give `initialize` the data and "engine": {"max_duration": "30ep"}.'
                )
                raise ScheduleError(self.type_name, [Fault(name, message)])
        return resolved.controller(base)

    def controller(self, base: Base) -> AutoWUController:
        decay = Decay(
            cooldown_type=self.cooldown_type,
            cooldown_start=(1 - self.cooldown_fraction) * self.total_steps,
            is_immediate=self.immediate_cooldown,
            factor=self.decay_phase_factor,
            watches_loss=self.decay_phase_stat == "loss",
        )
        return AutoWUController(self._warmup_test, decay, self.total_steps, base["lr"])

    @property
    def _warmup_test(self) -> WarmupTest:
        per_epoch = self.steps_per_epoch or 10
        steps = self.max_warmup_fraction * self.total_steps
        warmup = Warmup(
            steps=int(steps),
            steps_per_epoch=per_epoch,
            epochs=max(1, int(steps / per_epoch + 1e-9)),
            min_lr=self.min_lr,
            max_lr=self.max_lr,
            unit=self.warmup_unit,
            type=self.warmup_type,
        )
        return RobustTest(warmup) if self.test == "robust" else PublishedTest(warmup)

    def warnings(self) -> Iterator[str]:
        warning = self._warmup_test.warning()
        if warning is not None:
            yield warning

    def synthetic_loss(self, step: int, lr: float) -> float:
        del step
        valley = math.sqrt(self.min_lr * self.max_lr)
        return 1.0 + 0.3 * math.log10(max(lr, 1e-12) / valley) ** 2

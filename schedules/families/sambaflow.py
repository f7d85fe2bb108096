"""SambaFlow's schedules, by its names, and with the names of its command-line arguments.

Its source is not public: shapes and defaults are those of its documentation, and where that is
silent (the first value of a warmup, what follows the end) those of its neighbour transformers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from schedules.core.combinators import join, stairs
from schedules.core.curves import Curve, constant, cosine, exponential, linear
from schedules.core.fields import Factor, LearningRate, Ratio, Steps, WarmupStepsOrZero, as_number
from schedules.core.schedule import (
    Base,
    Curves,
    Fault,
    Schedule,
    curve_per_group,
    schedule_class,
    spread,
)

__all__ = [
    "CosineScheduleWithWarmup",
    "FixedLr",
    "PolynomialDecayScheduleWithWarmup",
    "StepSchedule",
]


@schedule_class
class _OfLearningRate(Schedule[int]):
    learning_rate: LearningRate | None = None
    """The learning rate, at its highest; null means each group's own."""

    def curves(self, base: Base) -> Curves:
        own = base["lr"]
        peaks = own
        if self.learning_rate is not None:
            peaks = spread("learning_rate", self.learning_rate, own)
        return {"lr": curve_per_group(self.curve, peaks)}

    @abstractmethod
    def curve(self, lr: float) -> Curve:
        """Return the curve of a group whose highest learning rate this is."""


@schedule_class
class _WarmupAndDecay(_OfLearningRate):
    warmup_steps: WarmupStepsOrZero = 0
    """Length of the warmup from 0."""
    max_steps: Steps
    """Length of the run, warmup included; it shapes the curve, and stops nothing."""
    end_lr_ratio: Ratio = 0.1
    """Share of the learning rate at the end, held from there on."""

    def faults(self) -> Iterator[Fault]:
        if as_number(self.warmup_steps) > as_number(self.max_steps):
            yield Fault(
                "warmup_steps",
                f"`warmup_steps` must be at most `max_steps` ({self.max_steps:g}), but is "
                f"{self.warmup_steps:g} instead; the run would end before its warmup.",
            )

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.warmup_steps)
        decay = self._decay(lr, self.end_lr_ratio * lr, as_number(self.max_steps) - steps)
        warmup = linear(0.0, lr, steps)
        return join([warmup, decay], boundaries=[steps], names=("warmup", "decay"))

    @abstractmethod
    def _decay(self, lr: float, end: float, steps: float) -> Curve:
        """Return what follows the warmup."""


@schedule_class
class CosineScheduleWithWarmup(
    _WarmupAndDecay,
    type_name="cosine_schedule_with_warmup",
    example={"warmup_steps": 20, "max_steps": "1dur"},
):
    """A straight warmup, then half a cosine wave to a share of the learning rate.

    With x = (k - warmup_steps) / (max_steps - warmup_steps)::

        lr(k) = lr * k / warmup_steps                                       k < warmup_steps
                lr * (r + (1 - r) * (1 + cos(pi * min(1, x))) / 2)          after, r = end_lr_ratio

    Source: SambaFlow's documentation, "Learning rate schedules".
    """

    def _decay(self, lr: float, end: float, steps: float) -> Curve:
        return cosine(lr, end, steps)


@schedule_class
class PolynomialDecayScheduleWithWarmup(
    _WarmupAndDecay,
    type_name="polynomial_decay_schedule_with_warmup",
    example={"warmup_steps": 20, "max_steps": "1dur"},
):
    """A straight warmup, then a straight decay to a share of the learning rate.

    With x = (k - warmup_steps) / (max_steps - warmup_steps)::

        lr(k) = lr * k / warmup_steps                         k < warmup_steps
                lr * (r + (1 - r) * (1 - min(1, x)))          after, r = end_lr_ratio

    Source: SambaFlow's documentation, "Learning rate schedules"; the polynomial is always linear.
    """

    end_lr_ratio: Ratio = 0.0
    """Share of the learning rate at the end, held from there on."""

    def _decay(self, lr: float, end: float, steps: float) -> Curve:
        return linear(lr, end, steps)


@schedule_class
class FixedLr(_OfLearningRate, type_name="fixed_lr"):
    """The learning rate, for ever.

    Source: SambaFlow's documentation, "Learning rate schedules".
    """

    def curve(self, lr: float) -> Curve:
        return constant(lr)


@schedule_class
class StepSchedule(
    _OfLearningRate, type_name="step_schedule", example={"decay_steps": 25, "gamma": 0.5}
):
    """Multiplies the learning rate by a factor after each ``decay_steps`` updates.

    ::

        lr(k) = lr * gamma ** floor(k / decay_steps)

    Source: the custom schedule of SambaFlow's documentation, which halves every 100 steps.
    """

    decay_steps: Steps = 100
    """Updates between two decays."""
    gamma: Factor = 0.5
    """Factor at each of them."""

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.decay_steps)
        return stairs(exponential(lr, self.gamma, steps), steps, count=1)

"""SambaFlow's schedules, with parameters named after SambaFlow's command-line arguments.

SambaFlow's source code is not public, so shapes and defaults follow its documentation. Details that
the documentation does not specify, such as the first value of a warmup and the values after the end
of a schedule, follow Hugging Face transformers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from schedules.core.combinators import decay_after_warmup, join, linear_warmup, stairs
from schedules.core.controller import Base, Curves
from schedules.core.curves import Curve, constant, cosine, exponential, linear
from schedules.core.fields import Factor, LearningRate, Ratio, Steps, WarmupStepsOrZero, as_number
from schedules.core.per_group import broadcast_strict, build_curve_per_group
from schedules.core.schedule import ParameterProblem, Schedule, schedule_class

__all__ = [
    "CosineScheduleWithWarmup",
    "FixedLr",
    "PolynomialDecayScheduleWithWarmup",
    "StepSchedule",
]


@schedule_class
class _PeakSchedule(Schedule[int]):
    learning_rate: LearningRate | None = None
    """Peak learning rate; null uses each param group's initial learning rate."""

    def curves(self, base: Base) -> Curves:
        own = base["lr"]
        peaks = own
        if self.learning_rate is not None:
            peaks = broadcast_strict("learning_rate", self.learning_rate, own)
        return {"lr": build_curve_per_group(self.curve, peaks)}

    @abstractmethod
    def curve(self, lr: float) -> Curve:
        """Return the curve with the peak learning rate ``lr``."""


@schedule_class
class _WarmupAndDecay(_PeakSchedule):
    warmup_steps: WarmupStepsOrZero = 0
    """Length of the linear warmup; 0 for no warmup."""
    max_steps: Steps
    """Step at which the decay ends, including the warmup. Training does not stop at this step."""
    end_lr_ratio: Ratio = 0.1
    """Learning rate from step `max_steps` onward, as a fraction of the peak learning rate."""
    one_based_warmup: bool = False
    """Whether to count warmup steps from 1. If true, the learning rate at step k is multiplied by
    (k + 1) / warmup_steps instead of k / warmup_steps, so it is not 0 at the first step, and the
    warmup ends one step earlier."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        if as_number(self.warmup_steps) > as_number(self.max_steps):
            yield ParameterProblem(
                "warmup_steps",
                f"`warmup_steps` must be at most `max_steps` ({self.max_steps:g}), got "
                f"{self.warmup_steps:g}. Shorten the warmup or increase `max_steps`.",
            )

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.warmup_steps)
        decay = self._decay(lr, self.end_lr_ratio * lr, as_number(self.max_steps) - steps)
        warmup = linear_warmup(lr, steps, one_based=self.one_based_warmup)
        return join([warmup, decay], boundaries=[steps], names=("warmup", "decay"))

    @abstractmethod
    def _decay(self, lr: float, end: float, steps: float) -> Curve:
        """Return the decay curve after the warmup, from ``lr`` to ``end`` over ``steps`` steps."""


@schedule_class
class CosineScheduleWithWarmup(
    _WarmupAndDecay,
    type_name="cosine_schedule_with_warmup",
    example={"warmup_steps": 20, "max_steps": "1dur"},
):
    """Linear warmup, then cosine decay to ``end_lr_ratio`` times the peak learning rate.

    With x = min(1, (k - warmup_steps) / (max_steps - warmup_steps)) and r = end_lr_ratio::

        lr(k) = lr * k / warmup_steps                        k < warmup_steps
                lr * (r + (1 - r) * (1 + cos(pi * x)) / 2)   k >= warmup_steps

    Source: SambaFlow's documentation, "Learning rate schedules".
    """

    def _decay(self, lr: float, end: float, steps: float) -> Curve:
        return decay_after_warmup(cosine, lr, end, steps)


@schedule_class
class PolynomialDecayScheduleWithWarmup(
    _WarmupAndDecay,
    type_name="polynomial_decay_schedule_with_warmup",
    example={"warmup_steps": 20, "max_steps": "1dur"},
):
    """Linear warmup, then linear decay to ``end_lr_ratio`` times the peak learning rate.

    With x = (k - warmup_steps) / (max_steps - warmup_steps) and r = end_lr_ratio::

        lr(k) = lr * k / warmup_steps                         k < warmup_steps
                lr * (r + (1 - r) * (1 - min(1, x)))          k >= warmup_steps

    Despite the name of the schedule, the decay is always linear.

    Source: SambaFlow's documentation, "Learning rate schedules".
    """

    end_lr_ratio: Ratio = 0.0
    """Learning rate from step `max_steps` onward, as a fraction of the peak learning rate."""

    def _decay(self, lr: float, end: float, steps: float) -> Curve:
        return decay_after_warmup(linear, lr, end, steps)


@schedule_class
class FixedLr(_PeakSchedule, type_name="fixed_lr"):
    """Keep the learning rate constant.

    Source: SambaFlow's documentation, "Learning rate schedules".
    """

    def curve(self, lr: float) -> Curve:
        return constant(lr)


@schedule_class
class StepSchedule(
    _PeakSchedule, type_name="step_schedule", example={"decay_steps": 25, "gamma": 0.5}
):
    """Multiply the learning rate by ``gamma`` every ``decay_steps`` steps.

    ::

        lr(k) = lr * gamma ** floor(k / decay_steps)

    Source: SambaFlow's documentation, where an example of a custom schedule halves the learning
    rate every 100 steps.
    """

    decay_steps: Steps = 100
    """Interval between decays."""
    gamma: Factor = 0.5
    """Factor applied to the learning rate at each decay."""

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.decay_steps)
        return stairs(exponential(lr, self.gamma, steps), steps, count=1)

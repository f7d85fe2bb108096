"""Composer's schedulers, by its names: multipliers of each group's own learning rate.

Durations are time strings or counts of updates. Formulas and defaults are those of
composer/optim/scheduler.py (0.32), as functions of the update; what its trainer does with them a
step later, and what it does to warmups, is in docs/decisions/0005-composer-schedules.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated

from schedules.core.combinators import delay, join, repeat, stairs
from schedules.core.curves import Curve, constant, cosine, exponential, linear, polynomial
from schedules.core.fields import (
    Factor,
    Milestones,
    Power,
    Range,
    Steps,
    WarmupStepsOrZero,
    as_number,
)
from schedules.core.schedule import Fault, LearningRateSchedule, schedule_class

__all__ = [
    "ConstantScheduler",
    "ConstantWithWarmupScheduler",
    "CosineAnnealingScheduler",
    "CosineAnnealingWarmRestartsScheduler",
    "CosineAnnealingWithWarmupScheduler",
    "ExponentialScheduler",
    "LinearScheduler",
    "LinearWithWarmupScheduler",
    "MultiStepScheduler",
    "MultiStepWithWarmupScheduler",
    "PolynomialScheduler",
    "PolynomialWithWarmupScheduler",
    "StepScheduler",
]


class _Scheduler(LearningRateSchedule):
    """A body that can begin at once, or behind a warmup that takes away from its length."""

    def curve(self, lr: float) -> Curve:
        return self._body(lr, begin=0)

    @abstractmethod
    def _body(self, lr: float, begin: float) -> Curve:
        """Return the curve from update ``begin`` on, on a clock that begins there."""

    def _peak(self, lr: float) -> float:
        """Return the learning rate that a warmup climbs to."""
        return lr


@schedule_class
class _WithWarmup(_Scheduler):
    """Puts a straight warmup from 0 in front of the body of the class beside it."""

    t_warmup: WarmupStepsOrZero
    """Length of the warmup, in which the learning rate climbs from 0; a scale schedule ratio leaves
    it as it is, unless it is a share of the run (`dur`)."""
    scale_warmup: bool = False
    """Whether the scale schedule ratio applies to the warmup too."""

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        warmup = as_number(self.t_warmup)
        end = as_number(getattr(self, "t_max", warmup))
        if warmup > end:
            yield Fault(
                "t_warmup",
                f"`t_warmup` must be at most `t_max` ({end:g} updates), but is "
                f"{warmup:g} updates instead; nothing would be left for the schedule.",
            )

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.t_warmup)
        warmup = linear(0.0, self._peak(lr), steps)
        body = self._body(lr, begin=steps)
        return join([warmup, body], boundaries=[steps], names=("warmup", "schedule"))


@schedule_class
class ConstantScheduler(_Scheduler, example={"alpha": 0.5, "t_max": "0.5dur"}):
    """A constant multiplier, and the learning rate itself after it.

    ::

        lr(k) = lr * alpha   k < t_max
                lr           after

    Source: ``ConstantScheduler`` of composer/optim/scheduler.py.
    """

    alpha: Factor = 1.0
    """Multiplier of the learning rate."""
    t_max: Steps = "1dur"
    """How long the multiplier holds."""

    def _body(self, lr: float, begin: float) -> Curve:
        end = as_number(self.t_max) - begin
        return join([constant(self.alpha * lr), constant(lr)], boundaries=[end])


@schedule_class
class ConstantWithWarmupScheduler(_WithWarmup, example={"t_warmup": "0.2dur", "alpha": 0.5}):
    """A straight warmup to a constant multiplier, which holds for ever.

    ::

        lr(k) = lr * alpha * min(1, k / t_warmup)

    Source: ``ConstantWithWarmupScheduler`` of composer/optim/scheduler.py, whose ``t_max`` changes
    nothing.
    """

    alpha: Factor = 1.0
    """Multiplier of the learning rate."""

    def _peak(self, lr: float) -> float:
        return self.alpha * lr

    def _body(self, lr: float, begin: float) -> Curve:
        del begin
        return constant(self.alpha * lr)


@schedule_class
class StepScheduler(_Scheduler, example={"step_size": "0.2dur", "gamma": 0.5}):
    """Multiplies the learning rate by a factor after each of equal periods.

    ::

        lr(k) = lr * gamma ** floor(k / step_size)

    Source: ``StepScheduler`` of composer/optim/scheduler.py.
    """

    step_size: Steps
    """Length of a period."""
    gamma: Factor = 0.1
    """Factor after each period."""

    def _body(self, lr: float, begin: float) -> Curve:
        del begin
        steps = as_number(self.step_size)
        return stairs(exponential(lr, self.gamma, steps), steps, count=1)


@schedule_class
class MultiStepScheduler(
    _Scheduler, example={"milestones": ["3ep", "60ba", "0.8dur"], "gamma": 0.5}
):
    """Multiplies the learning rate by a factor at each milestone.

    ::

        lr(k) = lr * gamma ** (number of milestones m with m <= k)

    Source: ``MultiStepScheduler`` of composer/optim/scheduler.py.
    """

    milestones: Milestones
    """Times at which the factor applies, in ascending order; units may differ."""
    gamma: Factor = 0.1
    """Factor at each milestone."""

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        if list(self.milestones) != sorted(self.milestones):
            yield Fault(
                "milestones",
                f"`milestones` must ascend, but are {list(self.milestones)} in updates instead; "
                "put them in order.",
            )

    def _body(self, lr: float, begin: float) -> Curve:
        levels = [constant(lr * self.gamma**passed) for passed in range(len(self.milestones) + 1)]
        return delay(join(levels, boundaries=map(as_number, self.milestones)), -begin)


@schedule_class
class MultiStepWithWarmupScheduler(
    _WithWarmup,
    MultiStepScheduler,
    example={"t_warmup": "0.2dur", "milestones": ["5ep", "0.8dur"], "gamma": 0.5},
):
    """`MultiStepScheduler` behind a straight warmup; milestones count from the start of the run.

    ::

        lr(k) = lr * k / t_warmup                      k < t_warmup
                that of MultiStepScheduler at k        after

    Source: ``MultiStepWithWarmupScheduler`` of composer/optim/scheduler.py.
    """


@schedule_class
class LinearScheduler(_Scheduler, example={"alpha_f": 0.1}):
    """A straight line from one multiplier to another, held from its end on.

    ::

        lr(k) = lr * (alpha_i + (alpha_f - alpha_i) * min(1, k / t_max))

    Source: ``LinearScheduler`` of composer/optim/scheduler.py.
    """

    alpha_i: Factor = 1.0
    """Multiplier at the start."""
    alpha_f: Factor = 0.0
    """Multiplier at the end."""
    t_max: Steps = "1dur"
    """Time at which the end is reached."""

    def _peak(self, lr: float) -> float:
        return self.alpha_i * lr

    def _body(self, lr: float, begin: float) -> Curve:
        return linear(self.alpha_i * lr, self.alpha_f * lr, as_number(self.t_max) - begin)


@schedule_class
class LinearWithWarmupScheduler(_WithWarmup, LinearScheduler, example={"t_warmup": "0.2dur"}):
    """`LinearScheduler` behind a straight warmup to its first multiplier.

    ::

        lr(k) = lr * alpha_i * k / t_warmup                               k < t_warmup
                lr * (alpha_i + (alpha_f - alpha_i) * min(1, x))          after,
                x = (k - t_warmup) / (t_max - t_warmup)

    Source: ``LinearWithWarmupScheduler`` of composer/optim/scheduler.py.
    """


@schedule_class
class ExponentialScheduler(_Scheduler, example={"gamma": 0.8}):
    """Exponential decay, smooth from update to update.

    ::

        lr(k) = lr * gamma ** (k / decay_period)

    Source: ``ExponentialScheduler`` of composer/optim/scheduler.py.
    """

    gamma: Annotated[float, Range(above=0)]
    """Factor in each period."""
    decay_period: Steps = "1ep"
    """Length of a period."""

    def _body(self, lr: float, begin: float) -> Curve:
        del begin
        return exponential(lr, self.gamma, as_number(self.decay_period))


@schedule_class
class CosineAnnealingScheduler(_Scheduler, example={"alpha_f": 0.1}):
    """Half a cosine wave from the learning rate to a multiple of it, held from its end on.

    ::

        lr(k) = lr * (alpha_f + (1 - alpha_f) * (1 + cos(pi * min(1, k / t_max))) / 2)

    Source: ``CosineAnnealingScheduler`` of composer/optim/scheduler.py.
    """

    t_max: Steps = "1dur"
    """Time at which the end is reached."""
    alpha_f: Factor = 0.0
    """Multiplier at the end."""

    def _body(self, lr: float, begin: float) -> Curve:
        return cosine(lr, self.alpha_f * lr, as_number(self.t_max) - begin)


@schedule_class
class CosineAnnealingWithWarmupScheduler(
    _WithWarmup, CosineAnnealingScheduler, example={"t_warmup": "0.2dur"}
):
    """`CosineAnnealingScheduler` behind a straight warmup.

    ::

        lr(k) = lr * k / t_warmup                                             k < t_warmup
                lr * (alpha_f + (1 - alpha_f) * (1 + cos(pi * min(1, x))) / 2)      after,
                x = (k - t_warmup) / (t_max - t_warmup)

    Source: ``CosineAnnealingWithWarmupScheduler`` of composer/optim/scheduler.py.
    """


@schedule_class
class CosineAnnealingWarmRestartsScheduler(_Scheduler, example={"t_0": "2ep", "t_mult": 2.0}):
    """Half a cosine wave again and again, each cycle longer than the last one.

    Cycle i is ``T_i`` updates long, ``T_0 = t_0`` and ``T_{i+1} = int(t_mult * T_i)``; at x of it::

        lr = lr * (alpha_f + (1 - alpha_f) * (1 + cos(pi * x)) / 2)

    Source: ``CosineAnnealingWarmRestartsScheduler`` of composer/optim/scheduler.py.
    """

    t_0: Steps
    """Length of the first cycle."""
    t_mult: Annotated[float, Range(at_least=1)] = 1.0
    """How many times as long each cycle is as the one before."""
    alpha_f: Factor = 0.0
    """Multiplier at the end of each cycle."""

    def _body(self, lr: float, begin: float) -> Curve:
        del begin
        end = self.alpha_f * lr
        return repeat(lambda cycle, steps: cosine(lr, end, steps), as_number(self.t_0), self.t_mult)


@schedule_class
class PolynomialScheduler(_Scheduler, example={"power": 2.0}):
    """Polynomial decay from the learning rate to a multiple of it, held from its end on.

    ::

        lr(k) = lr * (alpha_f + (1 - alpha_f) * (1 - min(1, k / t_max)) ** power)

    Source: ``PolynomialScheduler`` of composer/optim/scheduler.py.
    """

    power: Power
    """Exponent."""
    t_max: Steps = "1dur"
    """Time at which the end is reached."""
    alpha_f: Factor = 0.0
    """Multiplier at the end."""

    def _body(self, lr: float, begin: float) -> Curve:
        return polynomial(lr, self.alpha_f * lr, as_number(self.t_max) - begin, self.power)


@schedule_class
class PolynomialWithWarmupScheduler(
    _WithWarmup, PolynomialScheduler, example={"t_warmup": "0.2dur"}
):
    """`PolynomialScheduler` behind a straight warmup, quadratic by default.

    ::

        lr(k) = lr * k / t_warmup                                             k < t_warmup
                lr * (alpha_f + (1 - alpha_f) * (1 - min(1, x)) ** power)     after,
                x = (k - t_warmup) / (t_max - t_warmup)

    Source: ``PolynomialWithWarmupScheduler`` of composer/optim/scheduler.py.
    """

    power: Power = 2.0
    """Exponent."""

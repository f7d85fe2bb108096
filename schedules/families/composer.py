"""Composer's schedulers, with Composer's names and parameters.

Each schedule multiplies the initial learning rate of a param group by a factor. Durations are
numbers of steps or time strings such as "10ep". Formulas and defaults match
composer/optim/scheduler.py in Composer 0.32. Composer's trainer applies each value one step later
and scales warmups differently; see docs/decisions/0005-composer-schedules.md.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated

from schedules.core.combinators import (
    decay_after_warmup,
    delay,
    join,
    linear_warmup,
    multiply_at,
    repeat,
    stairs,
)
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
from schedules.core.schedule import LearningRateSchedule, ParameterProblem, schedule_class

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
    """Base class of Composer's schedulers. Subclasses define the curve, excluding any warmup."""

    def curve(self, lr: float) -> Curve:
        return self._body(lr, start=0)

    @abstractmethod
    def _body(self, lr: float, start: float) -> Curve:
        """Return the curve after the warmup. Its first step is step ``start`` of the schedule."""

    def _peak(self, lr: float) -> float:
        """Return the learning rate at the end of the warmup."""
        return lr


@schedule_class
class _WithWarmup(_Scheduler):
    """Mixin that adds a linear warmup before the curve of the other base class."""

    t_warmup: WarmupStepsOrZero
    """Length of the linear warmup; 0 for no warmup. `engine.scale_schedule_ratio` scales this
    length only if it is a fraction of the run (such as "0.1dur") or `scale_warmup` is true."""
    scale_warmup: bool = False
    """Whether `engine.scale_schedule_ratio` scales the warmup even if its length is not a fraction
    of the run."""
    one_based_warmup: bool = False
    """Whether to count warmup steps from 1. If true, the learning rate at step k is multiplied by
    (k + 1) / t_warmup instead of k / t_warmup, so it is not 0 at the first step, and the warmup
    ends one step earlier. Composer does not have this parameter."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        yield from super().find_problems()
        warmup = as_number(self.t_warmup)
        end = as_number(getattr(self, "t_max", warmup))
        if warmup > end:
            yield ParameterProblem(
                "t_warmup",
                f"`t_warmup` must be at most `t_max` ({end:g} steps), got {warmup:g} steps. "
                "Shorten the warmup or increase `t_max`.",
            )

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.t_warmup)
        warmup = linear_warmup(self._peak(lr), steps, one_based=self.one_based_warmup)
        body = self._body(lr, start=steps)
        return join([warmup, body], boundaries=[steps], names=("warmup", "schedule"))


@schedule_class
class ConstantScheduler(_Scheduler, example={"alpha": 0.5, "t_max": "0.5dur"}):
    """Multiply the learning rate by ``alpha`` for the first ``t_max`` steps.

    ::

        lr(k) = lr * alpha   k < t_max
                lr           k >= t_max

    Source: ``ConstantScheduler`` in composer/optim/scheduler.py.
    """

    alpha: Factor = 1.0
    """Multiplier of the learning rate before step `t_max`."""
    t_max: Steps = "1dur"
    """First step at which the learning rate is no longer multiplied by `alpha`."""

    def _body(self, lr: float, start: float) -> Curve:
        end = as_number(self.t_max) - start
        return join([constant(self.alpha * lr), constant(lr)], boundaries=[end])


@schedule_class
class ConstantWithWarmupScheduler(_WithWarmup, example={"t_warmup": "0.2dur", "alpha": 0.5}):
    """Linear warmup, then a constant learning rate.

    ::

        lr(k) = lr * alpha * min(1, k / t_warmup)

    Composer's ``t_max`` parameter is omitted here, because it has no effect in Composer.

    Source: ``ConstantWithWarmupScheduler`` in composer/optim/scheduler.py.
    """

    alpha: Factor = 1.0
    """Multiplier of the learning rate after the warmup."""

    def _peak(self, lr: float) -> float:
        return self.alpha * lr

    def _body(self, lr: float, start: float) -> Curve:
        del start
        return constant(self.alpha * lr)


@schedule_class
class StepScheduler(_Scheduler, example={"step_size": "0.2dur", "gamma": 0.5}):
    """Multiply the learning rate by ``gamma`` every ``step_size`` steps.

    ::

        lr(k) = lr * gamma ** floor(k / step_size)

    Source: ``StepScheduler`` in composer/optim/scheduler.py.
    """

    step_size: Steps
    """Interval between decays."""
    gamma: Factor = 0.1
    """Factor applied to the learning rate every `step_size` steps."""

    def _body(self, lr: float, start: float) -> Curve:
        del start
        steps = as_number(self.step_size)
        return stairs(exponential(lr, self.gamma, steps), steps, count=1)


@schedule_class
class MultiStepScheduler(
    _Scheduler, example={"milestones": ["3ep", "60ba", "0.8dur"], "gamma": 0.5}
):
    """Multiply the learning rate by ``gamma`` at each milestone.

    ::

        lr(k) = lr * gamma ** (number of milestones m with m <= k)

    Source: ``MultiStepScheduler`` in composer/optim/scheduler.py.
    """

    milestones: Milestones
    """Steps, in ascending order, at which the learning rate is multiplied by `gamma`. Entries
    can have different units, as in ["3ep", "0.8dur"]."""
    gamma: Factor = 0.1
    """Factor applied to the learning rate at each milestone."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        yield from super().find_problems()
        if list(self.milestones) != sorted(self.milestones):
            yield ParameterProblem(
                "milestones",
                "`milestones` must be in ascending order, got "
                f"{list(self.milestones)} (in steps). Sort the list.",
            )

    def _body(self, lr: float, start: float) -> Curve:
        return delay(multiply_at(lr, self.gamma, map(as_number, self.milestones)), -start)


@schedule_class
class MultiStepWithWarmupScheduler(
    _WithWarmup,
    MultiStepScheduler,
    example={"t_warmup": "0.2dur", "milestones": ["5ep", "0.8dur"], "gamma": 0.5},
):
    """Linear warmup followed by `MultiStepScheduler`. The warmup does not shift the milestones.

    ::

        lr(k) = lr * k / t_warmup                                      k < t_warmup
                lr * gamma ** (number of milestones m with m <= k)     k >= t_warmup

    Source: ``MultiStepWithWarmupScheduler`` in composer/optim/scheduler.py.
    """


@schedule_class
class LinearScheduler(_Scheduler, example={"alpha_f": 0.1}):
    """Scale the learning rate by a factor that changes linearly from ``alpha_i`` to ``alpha_f``.

    ::

        lr(k) = lr * (alpha_i + (alpha_f - alpha_i) * min(1, k / t_max))

    Source: ``LinearScheduler`` in composer/optim/scheduler.py.
    """

    alpha_i: Factor = 1.0
    """Multiplier of the learning rate at step 0, or at the end of the warmup if there is one."""
    alpha_f: Factor = 0.0
    """Multiplier of the learning rate at `t_max` and afterwards."""
    t_max: Steps = "1dur"
    """Step at which the multiplier of the learning rate reaches `alpha_f`."""

    def _peak(self, lr: float) -> float:
        return self.alpha_i * lr

    def _body(self, lr: float, start: float) -> Curve:
        steps = as_number(self.t_max) - start
        return decay_after_warmup(linear, self.alpha_i * lr, self.alpha_f * lr, steps)


@schedule_class
class LinearWithWarmupScheduler(_WithWarmup, LinearScheduler, example={"t_warmup": "0.2dur"}):
    """Linear warmup to ``alpha_i`` times the initial learning rate, then `LinearScheduler`.

    ::

        lr(k) = lr * alpha_i * k / t_warmup                        k < t_warmup
                lr * (alpha_i + (alpha_f - alpha_i) * min(1, x))   k >= t_warmup,
                x = (k - t_warmup) / (t_max - t_warmup)

    Source: ``LinearWithWarmupScheduler`` in composer/optim/scheduler.py.
    """


@schedule_class
class ExponentialScheduler(_Scheduler, example={"gamma": 0.8}):
    """Decay the learning rate exponentially, by a factor of ``gamma`` every ``decay_period`` steps.

    ::

        lr(k) = lr * gamma ** (k / decay_period)

    Source: ``ExponentialScheduler`` in composer/optim/scheduler.py.
    """

    gamma: Annotated[float, Range(above=0)]
    """Factor by which the learning rate is multiplied every `decay_period` steps."""
    decay_period: Steps = "1ep"
    """Interval over which the learning rate decays by a factor of `gamma`."""

    def _body(self, lr: float, start: float) -> Curve:
        del start
        return exponential(lr, self.gamma, as_number(self.decay_period))


@schedule_class
class CosineAnnealingScheduler(_Scheduler, example={"alpha_f": 0.1}):
    """Cosine decay to ``alpha_f`` times the initial learning rate over ``t_max`` steps.

    With x = min(1, k / t_max)::

        lr(k) = lr * (alpha_f + (1 - alpha_f) * (1 + cos(pi * x)) / 2)

    Source: ``CosineAnnealingScheduler`` in composer/optim/scheduler.py.
    """

    t_max: Steps = "1dur"
    """Step at which the multiplier of the learning rate reaches `alpha_f`."""
    alpha_f: Factor = 0.0
    """Multiplier of the learning rate at `t_max` and afterwards."""

    def _body(self, lr: float, start: float) -> Curve:
        steps = as_number(self.t_max) - start
        return decay_after_warmup(cosine, lr, self.alpha_f * lr, steps)


@schedule_class
class CosineAnnealingWithWarmupScheduler(
    _WithWarmup, CosineAnnealingScheduler, example={"t_warmup": "0.2dur"}
):
    """Linear warmup followed by `CosineAnnealingScheduler`.

    With x = min(1, (k - t_warmup) / (t_max - t_warmup)) and c = (1 + cos(pi * x)) / 2::

        lr(k) = lr * k / t_warmup                    k < t_warmup
                lr * (alpha_f + (1 - alpha_f) * c)   k >= t_warmup

    Source: ``CosineAnnealingWithWarmupScheduler`` in composer/optim/scheduler.py.
    """


@schedule_class
class CosineAnnealingWarmRestartsScheduler(_Scheduler, example={"t_0": "2ep", "t_mult": 2.0}):
    """Cosine annealing with warm restarts.

    Each cycle is ``t_mult`` times as long as the previous one, rounded down to whole steps. After
    a fraction x of a cycle::

        lr(x) = lr * (alpha_f + (1 - alpha_f) * (1 + cos(pi * x)) / 2)

    Source: ``CosineAnnealingWarmRestartsScheduler`` in composer/optim/scheduler.py.
    """

    t_0: Steps
    """Length of the first cycle."""
    t_mult: Annotated[float, Range(at_least=1)] = 1.0
    """Length of each cycle divided by the length of the previous one."""
    alpha_f: Factor = 0.0
    """Multiplier of the learning rate at the end of each cycle."""

    def _body(self, lr: float, start: float) -> Curve:
        del start
        end = self.alpha_f * lr
        return repeat(lambda cycle, steps: cosine(lr, end, steps), as_number(self.t_0), self.t_mult)


@schedule_class
class PolynomialScheduler(_Scheduler, example={"power": 2.0}):
    """Polynomial decay to ``alpha_f`` times the initial learning rate over ``t_max`` steps.

    ::

        lr(k) = lr * (alpha_f + (1 - alpha_f) * (1 - min(1, k / t_max)) ** power)

    Source: ``PolynomialScheduler`` in composer/optim/scheduler.py.
    """

    power: Power
    """Exponent of the polynomial."""
    t_max: Steps = "1dur"
    """Step at which the multiplier of the learning rate reaches `alpha_f`."""
    alpha_f: Factor = 0.0
    """Multiplier of the learning rate at `t_max` and afterwards."""

    def _body(self, lr: float, start: float) -> Curve:
        steps = as_number(self.t_max) - start
        decay = functools.partial(polynomial, power=self.power)
        return decay_after_warmup(decay, lr, self.alpha_f * lr, steps)


@schedule_class
class PolynomialWithWarmupScheduler(
    _WithWarmup, PolynomialScheduler, example={"t_warmup": "0.2dur"}
):
    """Linear warmup followed by `PolynomialScheduler`. The decay is quadratic by default.

    With x = min(1, (k - t_warmup) / (t_max - t_warmup))::

        lr(k) = lr * k / t_warmup                                   k < t_warmup
                lr * (alpha_f + (1 - alpha_f) * (1 - x) ** power)   k >= t_warmup

    Source: ``PolynomialWithWarmupScheduler`` in composer/optim/scheduler.py.
    """

    power: Power = 2.0
    """Exponent of the polynomial."""

"""The schedulers of "Dive into Deep Learning", by its names, with the warmup of its library, MXNet.

Every learning rate is absolute, and every schedule can begin with a warmup, straight or constant.
Values are those of the chapter's classes at the update k:
https://d2l.ai/chapter_optimization/lr-scheduler.html; MXNet's trainer asks for k + 1, see
docs/decisions/0007-d2l-schedules.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

from schedules.core.combinators import delay, join, pointwise, stairs
from schedules.core.curves import (
    Curve,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    linear,
    polynomial,
)
from schedules.core.fields import (
    Factor,
    LearningRate,
    Milestones,
    Power,
    Steps,
    WarmupStepsOrZero,
    as_number,
)
from schedules.core.schedule import (
    Base,
    Curves,
    Fault,
    Schedule,
    broadcast,
    curve_per_group,
    schedule_class,
    spread,
)

__all__ = [
    "CosineScheduler",
    "FactorScheduler",
    "MultiFactorScheduler",
    "PolyScheduler",
    "SquareRootScheduler",
]


@schedule_class
class _WithWarmup(Schedule[int]):
    """What all five have: the learning rate that they start from, and a warmup before it."""

    base_lr: LearningRate | None = None
    """Learning rate that the schedule starts from; null means each group's own."""
    warmup_steps: WarmupStepsOrZero = 0
    """Length of the warmup."""
    warmup_begin_lr: LearningRate = 0.0
    """Learning rate at the first update of the warmup."""
    warmup_mode: Literal["linear", "constant"] = "linear"
    """Whether the warmup climbs in a straight line, or stays where it begins."""

    def faults(self) -> Iterator[Fault]:
        end = getattr(self, "max_update", None)
        if end is not None and self.warmup_steps >= end:
            yield Fault(
                "warmup_steps",
                f"`warmup_steps` must be less than `max_update` ({end:g}), but is "
                f"{self.warmup_steps:g} instead; nothing would be left for the schedule.",
            )

    def curves(self, base: Base) -> Curves:
        own = base["lr"]
        starts = own if self.base_lr is None else spread("base_lr", self.base_lr, own)
        begins = broadcast("warmup_begin_lr", self.warmup_begin_lr, own)
        each = self.per_group(len(own))
        return {"lr": curve_per_group(_WithWarmup._warmed, each, starts, begins)}

    def _warmed(self, lr: float, begin: float) -> Curve:
        steps = as_number(self.warmup_steps)
        ramp = linear(begin, lr, steps)
        warmup = ramp if self.warmup_mode == "linear" else constant(begin)
        # Each body's clock includes the warmup, as in MXNet.
        body = delay(self._body(lr), -steps)
        return join([warmup, body], boundaries=[steps], names=("warmup", "schedule"))

    @abstractmethod
    def _body(self, lr: float) -> Curve:
        """Return the curve without the warmup, on the clock of the run."""


@schedule_class
class SquareRootScheduler(_WithWarmup, example={}):
    """The learning rate over the square root of the count of updates.

    ::

        lr(k) = base_lr / sqrt(k + 1)

    Source: ``SquareRootScheduler`` of the chapter.
    """

    clock_is_step = True

    def _body(self, lr: float) -> Curve:
        return inverse_sqrt(lr, steps=1)


@schedule_class
class FactorScheduler(_WithWarmup, example={"factor": 0.95, "stop_factor_lr": 0.02}):
    """Multiplies the learning rate by a factor, down to a floor.

    With ``step``, as MXNet: after each ``step`` updates. Without it, as the chapter: before each
    update, the first included::

        lr(k) = max(stop_factor_lr, base_lr * factor ** floor(k / step))
        lr(k) = max(stop_factor_lr, base_lr * factor ** (k + 1))

    Source: ``FactorScheduler`` of the chapter and of python/mxnet/lr_scheduler.py.
    """

    clock_is_step = True

    factor: Factor = 1.0
    """Factor on the learning rate."""
    stop_factor_lr: LearningRate = 1e-8
    """The floor."""
    step: Steps | None = None
    """Updates between two decays; null decays before each update."""

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        if not 0 < self.factor <= 1:
            yield Fault(
                "factor",
                f"`factor` must be more than 0 and at most 1, but is {self.factor:g} instead.",
            )

    def _body(self, lr: float) -> Curve:
        if self.step is None:
            decay = exponential(lr * self.factor, self.factor, steps=1)
        else:
            steps = as_number(self.step)
            decay = stairs(exponential(lr, self.factor, steps), steps, count=1)
        return pointwise(max, decay, constant(as_number(self.stop_factor_lr)))


@schedule_class
class MultiFactorScheduler(_WithWarmup, example={"step": [30, 60], "factor": 0.5}):
    """Multiplies the learning rate by a factor at each of some updates.

    ::

        lr(k) = base_lr * factor ** (number of steps s with s <= k)

    Source: ``MultiFactorScheduler`` of the chapter and of python/mxnet/lr_scheduler.py.
    """

    step: Milestones
    """Updates at which the factor applies, in ascending order."""
    factor: Factor = 1.0
    """Factor at each of them."""

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        if list(self.step) != sorted(set(self.step)):
            yield Fault("step", f"`step` must ascend, but is {list(self.step)}; put it in order.")

    def _body(self, lr: float) -> Curve:
        levels = [constant(lr * self.factor**passed) for passed in range(len(self.step) + 1)]
        return join(levels, boundaries=map(as_number, self.step))


@schedule_class
class PolyScheduler(_WithWarmup, example={"max_update": 90, "warmup_steps": 10}):
    """Polynomial decay to a final learning rate, held from its end on.

    With W = ``warmup_steps``::

        lr(k) = final_lr + (base_lr - final_lr) * (1 - min(1, (k - W) / (max_update - W))) ** pwr

    Source: ``PolyScheduler`` of python/mxnet/lr_scheduler.py.
    """

    max_update: Steps
    """Time at which the final learning rate is reached, warmup included."""
    pwr: Power = 2.0
    """Exponent."""
    final_lr: LearningRate = 0.0
    """Learning rate at the end."""

    def _body(self, lr: float) -> Curve:
        begin = as_number(self.warmup_steps)
        steps = as_number(self.max_update) - begin
        return delay(polynomial(lr, as_number(self.final_lr), steps, self.pwr), begin)


@schedule_class
class CosineScheduler(_WithWarmup, example={"max_update": 90, "warmup_steps": 10}):
    """Half a cosine wave to a final learning rate, held from its end on.

    With W = ``warmup_steps`` and x = min(1, (k - W) / (max_update - W))::

        lr(k) = final_lr + (base_lr - final_lr) * (1 + cos(pi * x)) / 2

    Source: ``CosineScheduler`` of the chapter and of python/mxnet/lr_scheduler.py.
    """

    max_update: Steps
    """Time at which the final learning rate is reached, warmup included."""
    final_lr: LearningRate = 0.0
    """Learning rate at the end."""

    def _body(self, lr: float) -> Curve:
        begin = as_number(self.warmup_steps)
        steps = as_number(self.max_update) - begin
        return delay(cosine(lr, as_number(self.final_lr), steps), begin)

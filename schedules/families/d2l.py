"""Schedulers from the book "Dive into Deep Learning", with an optional warmup as in MXNet.

Learning rates are absolute, not relative to a param group's initial learning rate. The warmup is
linear or constant. The values match the book
(https://d2l.ai/chapter_optimization/lr-scheduler.html). They can differ from those of MXNet, whose
trainer evaluates its schedulers at k + 1 for step k; see docs/decisions/0007-d2l-schedules.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

from schedules.core.combinators import delay, join, multiply_at, pointwise, stairs
from schedules.core.controller import Base, Curves
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
from schedules.core.per_group import broadcast, broadcast_strict, build_curve_per_group
from schedules.core.schedule import ParameterProblem, Schedule, schedule_class

__all__ = [
    "CosineScheduler",
    "FactorScheduler",
    "MultiFactorScheduler",
    "PolyScheduler",
    "SquareRootScheduler",
]


@schedule_class
class _WithWarmup(Schedule[int]):
    """Base class that adds the warmup parameters to the schedules in this module."""

    base_lr: LearningRate | None = None
    """Learning rate after the warmup; null uses each param group's initial learning rate."""
    warmup_steps: WarmupStepsOrZero = 0
    """Length of the warmup."""
    warmup_begin_lr: LearningRate = 0.0
    """Learning rate at the first step of the warmup."""
    warmup_mode: Literal["linear", "constant"] = "linear"
    """Shape of the warmup; "constant" keeps `warmup_begin_lr` until the warmup ends."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        end = getattr(self, "max_update", None)
        if end is not None and self.warmup_steps >= end:
            yield ParameterProblem(
                "warmup_steps",
                f"`warmup_steps` must be less than `max_update` ({end:g}), got "
                f"{self.warmup_steps:g}. Shorten the warmup or increase `max_update`.",
            )

    def curves(self, base: Base) -> Curves:
        own = base["lr"]
        starts = own if self.base_lr is None else broadcast_strict("base_lr", self.base_lr, own)
        warmup_starts = broadcast("warmup_begin_lr", self.warmup_begin_lr, own)
        each = self.per_group(len(own))
        return {"lr": build_curve_per_group(_WithWarmup._curve, each, starts, warmup_starts)}

    def _curve(self, lr: float, start: float) -> Curve:
        steps = as_number(self.warmup_steps)
        ramp = linear(start, lr, steps)
        warmup = ramp if self.warmup_mode == "linear" else constant(start)
        # The curve after the warmup counts from the start of the run, as in MXNet.
        body = delay(self._body(lr), -steps)
        return join([warmup, body], boundaries=[steps], names=("warmup", "schedule"))

    @abstractmethod
    def _body(self, lr: float) -> Curve:
        """Return the curve after the warmup, with steps counted from the start of the warmup."""


@schedule_class
class SquareRootScheduler(_WithWarmup, example={}):
    """Inverse square root decay over the steps since the start of the warmup.

    After the warmup::

        lr(k) = base_lr / sqrt(k + 1)

    Source: ``SquareRootScheduler`` in "Dive into Deep Learning".
    """

    has_rate_per_step = True

    def _body(self, lr: float) -> Curve:
        return inverse_sqrt(lr, steps=1)


@schedule_class
class FactorScheduler(_WithWarmup, example={"factor": 0.95, "stop_factor_lr": 0.02}):
    """Multiply the learning rate by a factor at regular intervals, down to a minimum.

    The factor is applied every ``step`` steps, as in MXNet. If ``step`` is null, the factor is
    applied before every step, including the first, as in "Dive into Deep Learning"::

        lr(k) = max(stop_factor_lr, base_lr * factor ** floor(k / step))  if step
        lr(k) = max(stop_factor_lr, base_lr * factor ** (k + 1))          otherwise

    Source: ``FactorScheduler`` in "Dive into Deep Learning" and in python/mxnet/lr_scheduler.py.
    """

    has_rate_per_step = True

    factor: Factor = 1.0
    """Factor applied to the learning rate at each decay."""
    stop_factor_lr: LearningRate = 1e-8
    """Minimum learning rate."""
    step: Steps | None = None
    """Interval between decays. If null, the learning rate decays before every step,
    including the first."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        yield from super().find_problems()
        if not 0 < self.factor <= 1:
            yield ParameterProblem(
                "factor",
                f"`factor` must be greater than 0 and at most 1, got {self.factor:g}.",
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
    """Piecewise constant learning rate, multiplied by ``factor`` at each step listed in ``step``.

    ::

        lr(k) = base_lr * factor ** (number of entries s of ``step`` with s <= k)

    Source: ``MultiFactorScheduler`` in "Dive into Deep Learning" and in
    python/mxnet/lr_scheduler.py.
    """

    step: Milestones
    """Steps, in ascending order, at which the learning rate is multiplied by `factor`."""
    factor: Factor = 1.0
    """Factor applied to the learning rate at each step in the list `step`."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        yield from super().find_problems()
        if list(self.step) != sorted(set(self.step)):
            yield ParameterProblem(
                "step",
                f"`step` must be in ascending order without duplicates, got {list(self.step)}. "
                "Sort the list and remove duplicates.",
            )

    def _body(self, lr: float) -> Curve:
        return multiply_at(lr, self.factor, map(as_number, self.step))


@schedule_class
class PolyScheduler(_WithWarmup, example={"max_update": 90, "warmup_steps": 10}):
    """Polynomial decay to ``final_lr`` at step ``max_update``.

    After the warmup, with x = min(1, (k - warmup_steps) / (max_update - warmup_steps))::

        lr(k) = final_lr + (base_lr - final_lr) * (1 - x) ** pwr

    Source: ``PolyScheduler`` in python/mxnet/lr_scheduler.py.
    """

    max_update: Steps
    """Step, counted from the start of the warmup, at which the learning rate reaches `final_lr`."""
    pwr: Power = 2.0
    """Exponent of the polynomial."""
    final_lr: LearningRate = 0.0
    """Learning rate at the end of the decay."""

    def _body(self, lr: float) -> Curve:
        warmup = as_number(self.warmup_steps)
        steps = as_number(self.max_update) - warmup
        return delay(polynomial(lr, as_number(self.final_lr), steps, self.pwr), warmup)


@schedule_class
class CosineScheduler(_WithWarmup, example={"max_update": 90, "warmup_steps": 10}):
    """Cosine decay to ``final_lr`` at step ``max_update``.

    After the warmup, with W = ``warmup_steps`` and x = min(1, (k - W) / (max_update - W))::

        lr(k) = final_lr + (base_lr - final_lr) * (1 + cos(pi * x)) / 2

    Source: ``CosineScheduler`` in "Dive into Deep Learning" and in python/mxnet/lr_scheduler.py.
    """

    max_update: Steps
    """Step, counted from the start of the warmup, at which the learning rate reaches `final_lr`."""
    final_lr: LearningRate = 0.0
    """Learning rate at the end of the decay."""

    def _body(self, lr: float) -> Curve:
        warmup = as_number(self.warmup_steps)
        steps = as_number(self.max_update) - warmup
        return delay(cosine(lr, as_number(self.final_lr), steps), warmup)

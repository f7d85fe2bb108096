"""PyTorch's schedulers, with PyTorch's names and parameters.

Formulas and defaults match torch/optim/lr_scheduler.py in PyTorch 2.13, with two main differences.
Each value depends only on the step k, not on the previous value. After the end of a schedule, the
values stay constant; for example, CosineAnnealingLR does not raise the learning rate again. For
other differences, see docs/decisions/0006-pytorch-schedules.md.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

from schedules.core.combinators import delay, join, multiply_at, pointwise, repeat, stairs
from schedules.core.controller import Base, Curves
from schedules.core.curves import Curve, constant, cosine, exponential, linear, polynomial
from schedules.core.fields import (
    Factor,
    LearningRate,
    Milestones,
    Momentum,
    Range,
    Rate,
    Steps,
    as_number,
)
from schedules.core.per_group import broadcast_lr, broadcast_strict, build_curve_per_group
from schedules.core.schedule import LearningRateSchedule, ParameterProblem, Schedule, schedule_class

__all__ = [
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LinearLR",
    "MultiStepLR",
    "OneCycleLR",
    "PolynomialLR",
    "StepLR",
]

Divisor = Annotated[float, Range(above=0)]


@schedule_class
class StepLR(LearningRateSchedule, example={"step_size": 20, "gamma": 0.5}):
    """Multiply the learning rate by ``gamma`` every ``step_size`` steps.

    ::

        lr(k) = lr * gamma ** floor(k / step_size)

    Source: ``StepLR`` in torch/optim/lr_scheduler.py.
    """

    step_size: Steps
    """Interval between decays."""
    gamma: Factor = 0.1
    """Factor applied to the learning rate every `step_size` steps."""

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.step_size)
        return stairs(exponential(lr, self.gamma, steps), steps, count=1)


@schedule_class
class MultiStepLR(LearningRateSchedule, example={"milestones": [30, 60, 80], "gamma": 0.5}):
    """Multiply the learning rate by ``gamma`` at each milestone.

    ::

        lr(k) = lr * gamma ** (number of milestones m with m <= k)

    Source: ``MultiStepLR`` in torch/optim/lr_scheduler.py.
    """

    milestones: Milestones
    """Steps, in any order, at which the learning rate is multiplied by `gamma`. If a step is
    listed twice, the learning rate is multiplied twice at that step."""
    gamma: Factor = 0.1
    """Factor applied to the learning rate at each milestone."""

    def curve(self, lr: float) -> Curve:
        return multiply_at(lr, self.gamma, sorted(map(as_number, self.milestones)))


@schedule_class
class ConstantLR(LearningRateSchedule, example={"factor": 0.5, "total_iters": 40}):
    """Multiply the initial learning rate by ``factor`` for the first ``total_iters`` steps.

    ::

        lr(k) = lr * factor   k < total_iters
                lr            k >= total_iters

    Source: ``ConstantLR`` in torch/optim/lr_scheduler.py.
    """

    factor: Factor = 1 / 3
    """Factor applied to the learning rate until step `total_iters`."""
    total_iters: Steps = 5
    """First step at which the learning rate is no longer multiplied by `factor`."""

    def curve(self, lr: float) -> Curve:
        end = as_number(self.total_iters)
        return join([constant(self.factor * lr), constant(lr)], boundaries=[end])


@schedule_class
class LinearLR(LearningRateSchedule, example={"total_iters": 60}):
    """Scale the initial learning rate by a factor that changes linearly over ``total_iters`` steps.

    With x = min(1, k / total_iters)::

        lr(k) = lr * (start_factor + (end_factor - start_factor) * x)

    Source: ``LinearLR`` in torch/optim/lr_scheduler.py.
    """

    start_factor: Factor = 1 / 3
    """Factor applied to the learning rate at the start."""
    end_factor: Factor = 1.0
    """Factor applied to the learning rate from step `total_iters` on."""
    total_iters: Steps = 5
    """Step at which the factor applied to the learning rate reaches `end_factor`."""

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.total_iters)
        return linear(self.start_factor * lr, self.end_factor * lr, steps)


@schedule_class
class ExponentialLR(LearningRateSchedule, example={"gamma": 0.97}):
    """Multiply the learning rate by ``gamma`` after every step.

    ::

        lr(k) = lr * gamma ** k

    Source: ``ExponentialLR`` in torch/optim/lr_scheduler.py.
    """

    has_rate_per_step = True

    gamma: Factor
    """Factor applied to the learning rate after every step."""

    def curve(self, lr: float) -> Curve:
        return exponential(lr, self.gamma, steps=1)


@schedule_class
class PolynomialLR(LearningRateSchedule, example={"total_iters": 80, "power": 2.0}):
    """Polynomial decay to 0 over ``total_iters`` steps.

    ::

        lr(k) = lr * (1 - min(1, k / total_iters)) ** power

    Source: ``PolynomialLR`` in torch/optim/lr_scheduler.py.
    """

    total_iters: Steps = 5
    """Step at which the learning rate reaches 0."""
    power: Rate = 1.0
    """Exponent of the polynomial; 0 keeps the learning rate constant."""

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.total_iters)
        return polynomial(lr, 0.0, steps, self.power) if self.power else constant(lr)


@schedule_class
class CosineAnnealingLR(LearningRateSchedule, example={"T_max": 80, "eta_min": 0.01}):
    """Cosine decay from the initial learning rate to ``eta_min`` over ``T_max`` steps.

    ::

        lr(k) = eta_min + (lr - eta_min) * (1 + cos(pi * min(1, k / T_max))) / 2

    After ``T_max`` steps, the learning rate stays at ``eta_min``. In PyTorch, it rises again.

    Source: ``CosineAnnealingLR`` in torch/optim/lr_scheduler.py.
    """

    T_max: Steps
    """Step at which the learning rate reaches `eta_min`."""
    eta_min: LearningRate = 0.0
    """Minimum learning rate."""

    def curve(self, lr: float) -> Curve:
        return cosine(lr, as_number(self.eta_min), as_number(self.T_max))


@schedule_class
class CosineAnnealingWarmRestarts(LearningRateSchedule, example={"T_0": 15, "T_mult": 2}):
    """Cosine annealing with warm restarts.

    Each cycle is ``T_mult`` times as long as the previous one. After a fraction x of a cycle::

        lr(x) = eta_min + (lr - eta_min) * (1 + cos(pi * x)) / 2

    Source: ``CosineAnnealingWarmRestarts`` in torch/optim/lr_scheduler.py.
    """

    T_0: Steps
    """Length of the first cycle."""
    T_mult: Annotated[int, Range(at_least=1)] = 1
    """Length of each cycle divided by the length of the previous one."""
    eta_min: LearningRate = 0.0
    """Minimum learning rate, reached at the end of each cycle."""

    def curve(self, lr: float) -> Curve:
        low, first = as_number(self.eta_min), as_number(self.T_0)
        return repeat(lambda cycle, steps: cosine(lr, low, steps), first, self.T_mult)


@schedule_class
class OneCycleLR(Schedule[int], example={"max_lr": 0.1, "total_steps": "1dur"}):
    """PyTorch's 1cycle policy: the learning rate rises to a peak, then falls below its first value.

    With n = ``total_steps``, the learning rate starts at ``max_lr / div_factor``, reaches
    ``max_lr`` at step ``pct_start * n - 1``, and ends at ``max_lr / div_factor / final_div_factor``
    at step ``n - 1``. If the peak would be before step 0, the cycle starts after the peak. With
    ``three_phase``, the learning rate falls from the peak to ``max_lr / div_factor`` as fast as it
    rose, and then to its final value. Each phase is a cosine or a straight line. Momentum goes from
    ``max_momentum`` to ``base_momentum`` and back. After step ``n - 1``, the values stay constant,
    whereas PyTorch's scheduler raises an error.

    Source: ``OneCycleLR`` in torch/optim/lr_scheduler.py; Smith and Topin, Super-convergence,
    https://arxiv.org/abs/1708.07120.
    """

    has_rate_per_step = True

    max_lr: LearningRate | None
    """Learning rate at the peak; null uses each param group's initial learning rate."""
    total_steps: Steps | None = None
    """Length of the cycle; null uses `epochs` times `steps_per_epoch`."""
    epochs: Annotated[int, Range(at_least=1)] | None = None
    """Number of epochs. Required if `total_steps` is null. Must be null if `total_steps` is set."""
    steps_per_epoch: Steps | None = None
    """Number of steps per epoch. Required if `total_steps` is null. Must be null if `total_steps`
    is set."""
    pct_start: Annotated[float, Range(at_least=0, below=1)] = 0.3
    """Fraction of the cycle during which the learning rate rises."""
    anneal_strategy: Literal["cos", "linear"] = "cos"
    """Shape of the curve in each phase: a cosine or a straight line."""
    cycle_momentum: bool = True
    """Whether to cycle momentum (betas[0] if the optimizer has betas) inversely to the learning
    rate."""
    base_momentum: Momentum = 0.85
    """Momentum at the peak of the learning rate."""
    max_momentum: Momentum = 0.95
    """Momentum at the start and at the end of the cycle."""
    div_factor: Divisor = 25.0
    """Ratio of the peak learning rate to the learning rate at the first step."""
    final_div_factor: Divisor = 1e4
    """Ratio of the learning rate at the first step to the final learning rate."""
    three_phase: bool = False
    """Whether the learning rate falls in two phases: first back to its starting value, then to its
    final value."""
    relative: bool = False
    """Whether `max_lr` is a multiple of each param group's initial learning rate. If false, it is
    an absolute learning rate."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        by_epochs = (self.epochs is not None) + (self.steps_per_epoch is not None)
        if by_epochs != (2 if self.total_steps is None else 0):
            yield ParameterProblem(
                "total_steps",
                "Either `total_steps` or both `epochs` and `steps_per_epoch` must be set, got "
                f"`total_steps` {self.total_steps}, `epochs` {self.epochs} and `steps_per_epoch` "
                f'{self.steps_per_epoch}. Set only `total_steps`, for example to "1dur", the '
                "length of the run.",
            )
            return
        ends = self._phase_ends
        if not all(start < end for _, start, end in self._phases):
            yield ParameterProblem(
                "pct_start",
                f"Each phase must have a positive length, but with `pct_start` "
                f"{self.pct_start:g} and {self._steps:g} steps, the phases end at steps "
                f"{', '.join(f'{end:g}' for end in ends)}. Increase the number of steps or "
                "change `pct_start`.",
            )

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        return ("lr", "momentum") if self.cycle_momentum else ("lr",)

    @property
    def length(self) -> int:
        return math.ceil(self._steps)

    @property
    def span(self) -> int:
        return int(self._steps)

    @property
    def _steps(self) -> float:
        if self.total_steps is not None:
            return float(as_number(self.total_steps))
        return float((self.epochs or 0) * as_number(self.steps_per_epoch or 0))

    @property
    def _phase_ends(self) -> tuple[float, ...]:
        climb, steps = self.pct_start * self._steps, self._steps
        if self.three_phase:
            return (climb - 1, 2 * climb - 2, steps - 1)
        return (climb - 1, steps - 1)

    @property
    def _phases(self) -> list[tuple[int, float, float]]:
        """Index, start and end of each phase, except for phases that would end before step 0."""
        ends = self._phase_ends
        bounds = enumerate(zip((0.0, *ends), ends, strict=False))
        return [(index, start, end) for index, (start, end) in bounds if end >= 0]

    def curves(self, base: Base) -> Curves:
        peaks = broadcast_lr(self, "max_lr", base["lr"])
        curves = {"lr": build_curve_per_group(self._lr_curve, peaks)}
        if self.cycle_momentum:
            curves["momentum"] = build_curve_per_group(
                self._momentum_curve,
                broadcast_strict("base_momentum", self.base_momentum, base["momentum"]),
                broadcast_strict("max_momentum", self.max_momentum, base["momentum"]),
            )
        return curves

    def _lr_curve(self, peak: float) -> Curve:
        start = peak / self.div_factor
        end = start / self.final_div_factor
        return self._join_phases([start, peak, *([start] if self.three_phase else []), end])

    def _momentum_curve(self, low: float, high: float) -> Curve:
        values = [high, low, high, high] if self.three_phase else [high, low, high]
        return self._join_phases(values)

    def _join_phases(self, values: list[float]) -> Curve:
        ramp = cosine if self.anneal_strategy == "cos" else linear
        phases = self._phases
        parts = [ramp(values[at], values[at + 1], end - start) for at, start, end in phases]
        starts = [start for _, start, _ in phases]
        parts[0] = delay(parts[0], starts[0]) if starts[0] else parts[0]
        names = [("climb", "descent", "annihilation")[at] for at, *_ in phases]
        return join(parts, boundaries=starts[1:], names=names)


_AMPLITUDES = {"triangular": 1.0, "triangular2": 0.5, "exp_range": 1.0}


@schedule_class
class CyclicLR(
    Schedule[int],
    example={"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 15, "mode": "triangular2"},
):
    """Cycle the learning rate linearly between two values, and momentum in the opposite direction.

    A factor s rises from 0 to 1 over ``step_size_up`` steps and falls to 0 over
    ``step_size_down`` steps::

        lr(k)       = base_lr + (max_lr - base_lr) * s(k) * A
        momentum(k) = max_momentum - (max_momentum - base_momentum) * s(k) * A

    The amplitude A is 1 in the mode "triangular", is halved after each cycle in "triangular2", and
    is ``gamma ** k`` in "exp_range".

    Source: ``CyclicLR`` in torch/optim/lr_scheduler.py; Smith, https://arxiv.org/abs/1506.01186.
    """

    has_rate_per_step = True

    base_lr: LearningRate
    """Lowest learning rate of each cycle."""
    max_lr: LearningRate | None
    """Peak learning rate at full amplitude (see `mode`); null uses each param group's initial
    learning rate."""
    step_size_up: Steps = 2000
    """Length of the rising part of each cycle."""
    step_size_down: Steps | None = None
    """Length of the falling part of each cycle; null uses `step_size_up`."""
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    """How the amplitude changes: it stays constant ("triangular"), halves after each cycle
    ("triangular2"), or is multiplied by `gamma` after every step ("exp_range")."""
    gamma: Factor = 1.0
    """Factor by which the amplitude is multiplied after every step if `mode` is "exp_range"."""
    cycle_momentum: bool = True
    """Whether to cycle momentum (betas[0] if the optimizer has betas) inversely to the learning
    rate."""
    base_momentum: Momentum = 0.8
    """Lowest momentum at full amplitude (see `mode`)."""
    max_momentum: Momentum = 0.9
    """Momentum when the learning rate is lowest."""
    relative: bool = False
    """Whether `base_lr` and `max_lr` are multiples of each param group's initial learning rate. If
    false, they are absolute learning rates."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        if self.gamma > 1:
            yield ParameterProblem(
                "gamma",
                f"`gamma` must be at most 1, got {self.gamma:g}. With a larger value, the "
                "amplitude would grow.",
            )

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        return ("lr", "momentum") if self.cycle_momentum else ("lr",)

    @property
    def span(self) -> int:
        return 3 * int(self._rise_steps + self._fall_steps)

    @property
    def _rise_steps(self) -> float:
        return as_number(self.step_size_up)

    @property
    def _fall_steps(self) -> float:
        return float(as_number(self.step_size_down or self.step_size_up))

    def curves(self, base: Base) -> Curves:
        bounds = [broadcast_lr(self, name, base["lr"]) for name in ("base_lr", "max_lr")]
        curves = {"lr": build_curve_per_group(self._triangles, *bounds)}
        if self.cycle_momentum:
            momentum = base["momentum"]
            curves["momentum"] = build_curve_per_group(
                self._triangles,
                broadcast_strict("max_momentum", self.max_momentum, momentum),
                broadcast_strict("base_momentum", self.base_momentum, momentum),
            )
        return curves

    def _triangles(self, foot: float, top: float) -> Curve:
        height = top - foot
        triangles = repeat(partial(self._triangle, height), self._rise_steps + self._fall_steps)
        if self.mode == "exp_range":
            triangles = pointwise(operator.mul, triangles, exponential(1.0, self.gamma, steps=1))
        return pointwise(operator.add, constant(foot), triangles)

    def _triangle(self, height: float, cycle: int, steps: float) -> Curve:
        del steps
        top = height * _AMPLITUDES[self.mode] ** cycle
        up, down = linear(0.0, top, self._rise_steps), linear(top, 0.0, self._fall_steps)
        return join([up, down], boundaries=[self._rise_steps])

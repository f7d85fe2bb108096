"""PyTorch's schedulers, by its names, as functions of the update.

Formulas and defaults are those of torch/optim/lr_scheduler.py (2.13), which computes most of them
from the last value; these follow from k alone, and hold their end where torch's cosine climbs
again: docs/decisions/0006-pytorch-schedules.md.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

from schedules.core.combinators import join, pointwise, repeat, stairs
from schedules.core.curves import Curve, constant, cosine, exponential, linear, polynomial
from schedules.core.fields import (
    Factor,
    LearningRate,
    Milestones,
    Momentum,
    Power,
    Range,
    Steps,
    as_number,
)
from schedules.core.schedule import (
    Base,
    Curves,
    Fault,
    LearningRateSchedule,
    Schedule,
    curve_per_group,
    schedule_class,
    spread,
)

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

Gamma = Annotated[float, Range(above=0)]
Divisor = Annotated[float, Range(above=0)]


@schedule_class
class StepLR(LearningRateSchedule, example={"step_size": 20, "gamma": 0.5}):
    """Multiplies the learning rate by a factor after each ``step_size`` updates.

    ::

        lr(k) = lr * gamma ** floor(k / step_size)

    Source: ``StepLR`` of torch/optim/lr_scheduler.py.
    """

    step_size: Steps
    """Length of a period."""
    gamma: Factor = 0.1
    """Factor after each period."""

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.step_size)
        return stairs(exponential(lr, self.gamma, steps), steps, count=1)


@schedule_class
class MultiStepLR(LearningRateSchedule, example={"milestones": [30, 60, 80], "gamma": 0.5}):
    """Multiplies the learning rate by a factor at each milestone, twice at one that is given twice.

    ::

        lr(k) = lr * gamma ** (number of milestones m with m <= k)

    Source: ``MultiStepLR`` of torch/optim/lr_scheduler.py.
    """

    milestones: Milestones
    """Times at which the factor applies, in any order, as in PyTorch."""
    gamma: Factor = 0.1
    """Factor at each milestone."""

    def curve(self, lr: float) -> Curve:
        levels = [constant(lr * self.gamma**passed) for passed in range(len(self.milestones) + 1)]
        return join(levels, boundaries=sorted(map(as_number, self.milestones)))


@schedule_class
class ConstantLR(LearningRateSchedule, example={"factor": 0.5, "total_iters": 40}):
    """A factor on the learning rate for some updates, and the learning rate itself after them.

    ::

        lr(k) = lr * factor   k < total_iters
                lr            after

    Source: ``ConstantLR`` of torch/optim/lr_scheduler.py.
    """

    factor: Factor = 1 / 3
    """Factor on the learning rate."""
    total_iters: Steps = 5
    """How long the factor holds."""

    def curve(self, lr: float) -> Curve:
        end = as_number(self.total_iters)
        return join([constant(self.factor * lr), constant(lr)], boundaries=[end])


@schedule_class
class LinearLR(LearningRateSchedule, example={"total_iters": 60}):
    """A straight line from one factor on the learning rate to another, held from its end on.

    ::

        lr(k) = lr * (start + (end - start) * min(1, k / total_iters))

    Source: ``LinearLR`` of torch/optim/lr_scheduler.py.
    """

    start_factor: Factor = 1 / 3
    """Factor at the start."""
    end_factor: Factor = 1.0
    """Factor at the end."""
    total_iters: Steps = 5
    """Time at which the end is reached."""

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.total_iters)
        return linear(self.start_factor * lr, self.end_factor * lr, steps)


@schedule_class
class ExponentialLR(LearningRateSchedule, example={"gamma": 0.97}):
    """Multiplies the learning rate by a factor after each update.

    ::

        lr(k) = lr * gamma ** k

    Source: ``ExponentialLR`` of torch/optim/lr_scheduler.py.
    """

    clock_is_step = True

    gamma: Gamma
    """Factor after each update."""

    def curve(self, lr: float) -> Curve:
        return exponential(lr, self.gamma, steps=1)


@schedule_class
class PolynomialLR(LearningRateSchedule, example={"total_iters": 80, "power": 2.0}):
    """Polynomial decay to 0, held from its end on.

    ::

        lr(k) = lr * (1 - min(1, k / total_iters)) ** power

    Source: ``PolynomialLR`` of torch/optim/lr_scheduler.py.
    """

    total_iters: Steps = 5
    """Time at which 0 is reached."""
    power: Power = 1.0
    """Exponent."""

    def curve(self, lr: float) -> Curve:
        return polynomial(lr, 0.0, as_number(self.total_iters), self.power)


@schedule_class
class CosineAnnealingLR(LearningRateSchedule, example={"T_max": 80, "eta_min": 0.01}):
    """Half a cosine wave from the learning rate to a minimum, held from its end on.

    ::

        lr(k) = eta_min + (lr - eta_min) * (1 + cos(pi * min(1, k / T_max))) / 2

    PyTorch's goes on past ``T_max`` and climbs back to the learning rate.

    Source: ``CosineAnnealingLR`` of torch/optim/lr_scheduler.py.
    """

    T_max: Steps
    """Time at which the minimum is reached."""
    eta_min: LearningRate = 0.0
    """The minimum."""

    def curve(self, lr: float) -> Curve:
        return cosine(lr, as_number(self.eta_min), as_number(self.T_max))


@schedule_class
class CosineAnnealingWarmRestarts(LearningRateSchedule, example={"T_0": 15, "T_mult": 2}):
    """Half a cosine wave again and again, each cycle ``T_mult`` times as long as the last one.

    At x of a cycle::

        lr = eta_min + (lr - eta_min) * (1 + cos(pi * x)) / 2

    Source: ``CosineAnnealingWarmRestarts`` of torch/optim/lr_scheduler.py.
    """

    T_0: Steps
    """Length of the first cycle."""
    T_mult: Annotated[int, Range(at_least=1)] = 1
    """How many times as long each cycle is as the one before."""
    eta_min: LearningRate = 0.0
    """The minimum, at the end of each cycle."""

    def curve(self, lr: float) -> Curve:
        low, first = as_number(self.eta_min), as_number(self.T_0)
        return repeat(lambda cycle, steps: cosine(lr, low, steps), first, self.T_mult)


@schedule_class
class OneCycleLR(Schedule[int], example={"max_lr": 0.1, "total_steps": "1dur"}):
    """PyTorch's 1cycle: up to a maximum, then far below the start, momentum mirrored.

    With n = ``total_steps``, a climb from ``max_lr / div_factor`` until ``pct_start * n - 1`` and a
    descent to ``max_lr / div_factor / final_div_factor`` until ``n - 1``; ``three_phase`` comes
    down as it went up first. Each phase is a cosine or a straight line. Momentum goes from
    ``max_momentum`` to ``base_momentum`` and back. The end is held; PyTorch raises an error there.

    Source: ``OneCycleLR`` of torch/optim/lr_scheduler.py; Smith and Topin, Super-convergence,
    https://arxiv.org/abs/1708.07120.
    """

    clock_is_step = True

    max_lr: LearningRate
    """Learning rate at the peak."""
    total_steps: Steps | None = None
    """Length of the cycle; null means `epochs` times `steps_per_epoch`."""
    epochs: Annotated[int, Range(at_least=1), "epochs"] | None = None
    """Number of epochs, where `total_steps` is absent."""
    steps_per_epoch: Steps | None = None
    """Updates in an epoch, where `total_steps` is absent."""
    pct_start: Annotated[float, Range(above=0, below=1), "share of the cycle"] = 0.3
    """Share of the cycle in which the learning rate climbs."""
    anneal_strategy: Literal["cos", "linear"] = "cos"
    """Shape of each phase."""
    cycle_momentum: bool = True
    """Whether momentum (betas[0] where an optimizer has betas) is cycled inversely."""
    base_momentum: Momentum = 0.85
    """Momentum at the peak of the learning rate."""
    max_momentum: Momentum = 0.95
    """Momentum at the start and at the end."""
    div_factor: Divisor = 25.0
    """The peak over the learning rate at the start."""
    final_div_factor: Divisor = 1e4
    """The learning rate at the start over the one at the end."""
    three_phase: bool = False
    """Whether the learning rate comes back to its start before it falls to its end."""

    def faults(self) -> Iterator[Fault]:
        by_epochs = (self.epochs is not None) + (self.steps_per_epoch is not None)
        if by_epochs != (2 if self.total_steps is None else 0):
            yield Fault(
                "total_steps",
                "`total_steps` or both `epochs` and `steps_per_epoch` must be given, and not both "
                'kinds; "1dur" is the length of the run.',
            )
            return
        knots = self._knots
        if sorted(set(knots)) != list(knots) or knots[0] <= 0:
            yield Fault(
                "pct_start",
                f"`pct_start` must leave each phase some of the {self._steps:g} updates, but the "
                f"phases end at {', '.join(f'{knot:g}' for knot in knots)} instead; lengthen the "
                "cycle, or change the share.",
            )

    @property
    def drives(self) -> tuple[str, ...]:
        return ("lr", "momentum") if self.cycle_momentum else ("lr",)

    @property
    def span(self) -> int:
        return int(self._steps)

    @property
    def _steps(self) -> float:
        if self.total_steps is not None:
            return float(as_number(self.total_steps))
        return float((self.epochs or 0) * as_number(self.steps_per_epoch or 0))

    @property
    def _knots(self) -> tuple[float, ...]:
        climb, steps = self.pct_start * self._steps, self._steps
        if self.three_phase:
            return (climb - 1, 2 * climb - 2, steps - 1)
        return (climb - 1, steps - 1)

    def curves(self, base: Base) -> Curves:
        curves = {
            "lr": curve_per_group(self._of_lr, spread("max_lr", self.max_lr, base["lr"])),
        }
        if self.cycle_momentum:
            curves["momentum"] = curve_per_group(
                self._of_momentum,
                spread("base_momentum", self.base_momentum, base["momentum"]),
                spread("max_momentum", self.max_momentum, base["momentum"]),
            )
        return curves

    def _of_lr(self, peak: float) -> Curve:
        start = peak / self.div_factor
        end = start / self.final_div_factor
        return self._through([start, peak, start, end] if self.three_phase else [start, peak, end])

    def _of_momentum(self, low: float, high: float) -> Curve:
        return self._through([high, low, high, high] if self.three_phase else [high, low, high])

    def _through(self, values: list[float]) -> Curve:
        ramp = cosine if self.anneal_strategy == "cos" else linear
        begins = (0.0, *self._knots)
        phases = [
            ramp(values[at], values[at + 1], begins[at + 1] - begins[at])
            for at in range(len(self._knots))
        ]
        names = ("climb", "descent", "annihilation")[: len(phases)]
        return join(phases, boundaries=self._knots[:-1], names=names)


_AMPLITUDES = {"triangular": 1.0, "triangular2": 0.5, "exp_range": 1.0}


@schedule_class
class CyclicLR(
    Schedule[int],
    example={"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 15, "mode": "triangular2"},
):
    """Triangles between two learning rates, for ever, momentum mirrored.

    With s climbing from 0 to 1 in ``step_size_up`` updates and falling back in ``step_size_down``::

        lr(k)       = base_lr + (max_lr - base_lr) * s(k) * A
        momentum(k) = max_momentum - (max_momentum - base_momentum) * s(k) * A

    where A is 1 ("triangular"), halved after each cycle ("triangular2"), or ``gamma ** k``
    ("exp_range").

    Source: ``CyclicLR`` of torch/optim/lr_scheduler.py; Smith, https://arxiv.org/abs/1506.01186.
    """

    clock_is_step = True

    base_lr: LearningRate
    """Learning rate at the bottom."""
    max_lr: LearningRate
    """Learning rate at the top of the first triangle."""
    step_size_up: Steps = 2000
    """Length of a climb."""
    step_size_down: Steps | None = None
    """Length of a descent; null means as long as the climb."""
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    """How the triangles shrink."""
    gamma: Gamma = 1.0
    """Factor on the height after each update, in the mode "exp_range"."""
    cycle_momentum: bool = True
    """Whether momentum (betas[0] where an optimizer has betas) is cycled inversely."""
    base_momentum: Momentum = 0.8
    """Momentum at the top of the first triangle."""
    max_momentum: Momentum = 0.9
    """Momentum at the bottom of the triangles."""

    def faults(self) -> Iterator[Fault]:
        if self.gamma > 1:
            yield Fault(
                "gamma", f"`gamma` must be at most 1, but is {self.gamma:g}: triangles would grow."
            )

    @property
    def drives(self) -> tuple[str, ...]:
        return ("lr", "momentum") if self.cycle_momentum else ("lr",)

    @property
    def span(self) -> int:
        return 3 * int(self._up + self._down)

    @property
    def _up(self) -> float:
        return as_number(self.step_size_up)

    @property
    def _down(self) -> float:
        return float(as_number(self.step_size_down or self.step_size_up))

    def curves(self, base: Base) -> Curves:
        lr = base["lr"]
        curves = {
            "lr": curve_per_group(
                self._triangles,
                spread("base_lr", self.base_lr, lr),
                spread("max_lr", self.max_lr, lr),
            )
        }
        if self.cycle_momentum:
            momentum = base["momentum"]
            curves["momentum"] = curve_per_group(
                self._triangles,
                spread("max_momentum", self.max_momentum, momentum),
                spread("base_momentum", self.base_momentum, momentum),
            )
        return curves

    def _triangles(self, foot: float, top: float) -> Curve:
        height = top - foot
        triangles = repeat(partial(self._triangle, height), self._up + self._down)
        if self.mode == "exp_range":
            triangles = pointwise(operator.mul, triangles, exponential(1.0, self.gamma, steps=1))
        return pointwise(operator.add, constant(foot), triangles)

    def _triangle(self, height: float, cycle: int, steps: float) -> Curve:
        del steps
        top = height * _AMPLITUDES[self.mode] ** cycle
        up, down = linear(0.0, top, self._up), linear(top, 0.0, self._down)
        return join([up, down], boundaries=[self._up])

"""DeepSpeed's schedules: OneCycle, LRRangeTest, WarmupLR, WarmupDecayLR and WarmupCosineLR.

Parameters, defaults and curves match deepspeed/runtime/lr_schedules.py in DeepSpeed 0.19, except
as the docstrings state. docs/decisions/0003-deepspeed-schedules.md explains the differences.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

from schedules.core.combinators import delay, join, stairs
from schedules.core.controller import Base, Curves
from schedules.core.curves import Curve, constant, cosine, inverse_time, linear, linear_growth, log
from schedules.core.fields import (
    AutoValue,
    LearningRate,
    Momentum,
    PerGroup,
    Range,
    Rate,
    Ratio,
    StairCount,
    Steps,
    StepsOrZero,
    WarmupSteps,
    as_number,
)
from schedules.core.per_group import (
    broadcast,
    broadcast_lr,
    broadcast_strict,
    build_curve_per_group,
    exceeds,
)
from schedules.core.schedule import ParameterProblem, Schedule, schedule_class

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

LastBatch = Annotated[int, Range(at_least=-1)]
_AUTO = AutoValue("transformers, accelerate")
_CYCLE = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 30}


@schedule_class
class _DeepSpeedSchedule(Schedule[int]):
    """Base class that adds the parameter ``last_batch_iteration`` to the DeepSpeed schedules."""

    last_batch_iteration: LastBatch = -1
    """Index of the last step to skip at the start of the schedule; -1 skips none."""

    def curves(self, base: Base) -> Curves:
        done = self.last_batch_iteration + 1
        return {
            name: tuple(delay(curve, -done) for curve in group) if done else group
            for name, group in self._curves(base).items()
        }

    @abstractmethod
    def _curves(self, base: Base) -> Curves:
        """Return the curves of the whole schedule, ignoring ``last_batch_iteration``."""


@schedule_class
class OneCycle(
    _DeepSpeedSchedule,
    example=_CYCLE | {"cycle_first_stair_count": 6, "decay_step_size": 10, "decay_lr_rate": 0.5},
):
    """1Cycle: the learning rate rises and falls, momentum falls and rises, and then both decay.

    A factor s rises from 0 to 1 over ``first = cycle_first_step_size`` steps and falls back to 0
    over ``second = cycle_second_step_size`` steps, continuously or in equal stairs. With
    ``T = first + second`` and ``n = (k - T) / decay_step_size``::

        lr(k)       = cycle_min_lr + (cycle_max_lr - cycle_min_lr) * s(k)     k <= T
                      cycle_min_lr / (1 + decay_lr_rate * n)                  k > T
        momentum(k) = cycle_max_mom - (cycle_max_mom - cycle_min_mom) * s(k)  k <= T
                      cycle_max_mom / (1 + decay_mom_rate * n)                k > T

    The learning rate peaks at exactly ``cycle_max_lr``, at k = first. Unlike in DeepSpeed, momentum
    starts at ``cycle_max_mom`` and decays after the cycle. In DeepSpeed, momentum starts at
    ``cycle_min_mom``, grows after the cycle, and exceeds 1 in long runs. DeepSpeed also sets beta2
    to 0.99.

    >>> cycle = OneCycle(cycle_min_lr=0.1, cycle_max_lr=0.5, cycle_first_step_size=2)
    >>> curves = cycle.curves({"lr": (0.1,), "momentum": (0.9,)})
    >>> [round(lr, 6) for lr in curves["lr"][0].values(6)]
    [0.1, 0.3, 0.5, 0.3, 0.1, 0.1]
    >>> [round(momentum, 6) for momentum in curves["momentum"][0].values(6)]
    [0.9, 0.85, 0.8, 0.85, 0.9, 0.9]

    Source: Smith, A disciplined approach to neural network hyper-parameters,
    https://arxiv.org/abs/1803.09820; DeepSpeed's tutorial "1-Cycle Schedule".
    """

    cycle_min_lr: LearningRate
    """Learning rate at the start and at the end of the cycle."""
    cycle_max_lr: LearningRate | None
    """Learning rate at the peak, after exactly `cycle_first_step_size` steps; null uses each param
    group's initial learning rate."""
    decay_lr_rate: Rate = 0.0
    """Decay rate of the learning rate after the cycle. After n intervals of `decay_step_size`
    steps, the learning rate is `cycle_min_lr / (1 + decay_lr_rate * n)`."""
    cycle_first_step_size: Steps = 2000
    """Length of the first half of the cycle, in which the learning rate rises."""
    cycle_second_step_size: Steps | None = None
    """Length of the second half of the cycle; null uses `cycle_first_step_size`."""
    cycle_first_stair_count: StairCount = 0
    """Number of equal stairs in the first half of the cycle; 0 disables the staircase."""
    cycle_second_stair_count: StairCount | None = None
    """Number of equal stairs in the second half of the cycle; 0 disables the staircase, and null
    uses `cycle_first_stair_count`."""
    decay_step_size: StepsOrZero | None = None
    """Length of each decay interval after the cycle; see `decay_lr_rate`. 0 or null disables the
    decay. Otherwise, it never ends, so set the length of the run in `engine.max_duration`."""
    post_cycle_decay_step_size: StepsOrZero | None = None
    """Alias of `decay_step_size`, used in DeepSpeed's tutorial. Set only one of the two keys."""
    cycle_momentum: bool = True
    """Whether to cycle momentum (betas[0] if the optimizer has betas) inversely to the learning
    rate."""
    cycle_min_mom: Momentum = 0.8
    """Momentum at the peak of the learning rate."""
    cycle_max_mom: Momentum = 0.9
    """Momentum at the start and at the end of the cycle."""
    decay_mom_rate: Rate = 0.0
    """Decay rate of momentum after the cycle. After n intervals of `decay_step_size` steps,
    momentum is `cycle_max_mom / (1 + decay_mom_rate * n)`."""
    relative: bool = False
    """Whether `cycle_min_lr` and `cycle_max_lr` are multiples of each param group's initial
    learning rate. If false, they are absolute learning rates."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        for low, high in (("cycle_min_lr", "cycle_max_lr"), ("cycle_min_mom", "cycle_max_mom")):
            if getattr(self, high) is not None and exceeds(getattr(self, low), getattr(self, high)):
                yield ParameterProblem(
                    high,
                    f"`{high}` must be at least `{low}` ({_format_value(getattr(self, low))}), "
                    f"got {_format_value(getattr(self, high))}. Swap the two values.",
                )
        halves = [
            ("cycle_first_stair_count", self.cycle_first_stair_count, self._first_steps),
            ("cycle_second_stair_count", self._second_stairs, self._second_steps),
        ]
        invalid = [half for half in halves if half[1] > half[2]]
        if len(invalid) == 2 and self.cycle_second_stair_count is None:
            del invalid[1]  # The second count defaults to the first, so it is the same problem.
        for name, count, steps in invalid:
            yield ParameterProblem(
                name,
                f"`{name}` must be at most {steps}, the number of steps in this half of the cycle, "
                f"got {count}. Set it to 0 to disable the staircase.",
            )
        if self.decay_step_size is not None and self.post_cycle_decay_step_size is not None:
            yield ParameterProblem(
                "post_cycle_decay_step_size",
                "`post_cycle_decay_step_size` is an alias of `decay_step_size`, but both are set. "
                "Remove one of the two keys.",
            )

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        return ("lr", "momentum") if self.cycle_momentum else ("lr",)

    @property
    def length(self) -> int | None:
        decays = self._decay_steps and (self.decay_lr_rate or self.decay_mom_rate)
        return None if decays else int(self._first_steps) + self._second_steps

    @property
    def span(self) -> int:
        cycle = int(self._first_steps) + self._second_steps
        return cycle + (cycle // 2 if self.length is None else 1)

    @property
    def _first_steps(self) -> float:
        return as_number(self.cycle_first_step_size)

    @property
    def _second_steps(self) -> int:
        return int(self.cycle_second_step_size or self.cycle_first_step_size)

    @property
    def _second_stairs(self) -> int:
        count = self.cycle_second_stair_count
        return self.cycle_first_stair_count if count is None else count

    @property
    def _decay_steps(self) -> int:
        return int(self.decay_step_size or self.post_cycle_decay_step_size or 0)

    def _curves(self, base: Base) -> Curves:
        bounds = [broadcast_lr(self, name, base["lr"]) for name in ("cycle_min_lr", "cycle_max_lr")]
        curves = {"lr": build_curve_per_group(partial(self._cycle, self.decay_lr_rate), *bounds)}
        if self.cycle_momentum:
            momentum = base["momentum"]
            curves["momentum"] = build_curve_per_group(
                partial(self._cycle, self.decay_mom_rate),
                broadcast_strict("cycle_max_mom", self.cycle_max_mom, momentum),
                broadcast_strict("cycle_min_mom", self.cycle_min_mom, momentum),
            )
        return curves

    def _cycle(self, decay_rate: float, ends: float, middle: float) -> Curve:
        first, second = self._first_steps, self._second_steps
        rise, fall = linear(ends, middle, first), linear(middle, ends, second)
        if self.cycle_first_stair_count:
            rise = stairs(rise, first, self.cycle_first_stair_count)
        if self._second_stairs:
            fall = stairs(fall, second, self._second_stairs, rounds_up=True)
        after = constant(ends)
        if self._decay_steps and decay_rate:
            after = inverse_time(ends, decay_rate, self._decay_steps)
        names = ("first part", "second part", "after the cycle")
        return join([rise, fall, after], boundaries=[first, first + second], names=names)


@schedule_class
class LRRangeTest(
    _DeepSpeedSchedule,
    example={"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 20},
):
    """LR range test: increase the learning rate linearly and indefinitely.

    At step k, with x = k / ``lr_range_test_step_size``::

        lr(k) = lr_range_test_min_lr * (1 + lr_range_test_step_rate * x)

    With ``lr_range_test_staircase``, x is rounded down. Interrupt the run when the loss diverges.

    >>> test = LRRangeTest(lr_range_test_min_lr=0.1, lr_range_test_step_size=2)
    >>> [round(lr, 6) for lr in test.curves({"lr": (0.1,)})["lr"][0].values(5)]
    [0.1, 0.15, 0.2, 0.25, 0.3]

    Source: Smith, Cyclical learning rates for training neural networks,
    https://arxiv.org/abs/1506.01186, section 3.3; DeepSpeed's tutorial "Learning Rate Range Test".
    """

    lr_range_test_min_lr: LearningRate = 1e-3
    """Learning rate at the first step."""
    lr_range_test_step_size: Steps = 2000
    """Interval over which the learning rate increases by `lr_range_test_step_rate` times
    `lr_range_test_min_lr`."""
    lr_range_test_step_rate: Rate = 1.0
    """Increase in the learning rate over `lr_range_test_step_size` steps, as a multiple of
    `lr_range_test_min_lr`."""
    lr_range_test_staircase: bool = False
    """Whether the learning rate increases only once every `lr_range_test_step_size` steps."""
    relative: bool = False
    """Whether `lr_range_test_min_lr` is a multiple of each param group's initial learning rate. If
    false, it is an absolute learning rate."""

    @property
    def span(self) -> int:
        return 5 * int(self.lr_range_test_step_size)

    def _curves(self, base: Base) -> Curves:
        minima = broadcast_lr(self, "lr_range_test_min_lr", base["lr"])
        return {"lr": build_curve_per_group(self._growth, minima)}

    def _growth(self, minimum: float) -> Curve:
        steps = as_number(self.lr_range_test_step_size)
        growth = linear_growth(minimum, self.lr_range_test_step_rate, steps)
        return stairs(growth, steps, count=1) if self.lr_range_test_staircase else growth


WarmupType = Literal["log", "linear"]


@schedule_class
class WarmupLR(_DeepSpeedSchedule, example={"warmup_num_steps": 30, "warmup_type": "linear"}):
    """Warmup: increase the learning rate to a maximum, then keep it constant.

    With N = ``warmup_num_steps``::

        lr(k) = warmup_min_lr + (warmup_max_lr - warmup_min_lr) * g(k)
        g(k)  = min(1, ln(1 + k) / ln(max(2, N)))     warmup_type "log"
                min(1, k / N)                         warmup_type "linear"

    The linear ramp reaches the maximum at k = N, the logarithmic ramp at k = N - 1. DeepSpeed
    reaches the maximum one step later, because its first two steps both use the minimum.

    >>> warmup = WarmupLR(warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    >>> list(warmup.curves({"lr": (1.0,)})["lr"][0].values(6))
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]

    Source: ``WarmupLR`` in deepspeed/runtime/lr_schedules.py.
    """

    warmup_min_lr: Annotated[LearningRate, _AUTO] = 0.0
    """Learning rate at the first step."""
    warmup_max_lr: Annotated[LearningRate | None, _AUTO] = None
    """Learning rate after the warmup; null uses each param group's initial learning rate."""
    warmup_num_steps: Annotated[WarmupSteps, _AUTO] = 1000
    """Length of the warmup."""
    warmup_type: WarmupType = "log"
    """Shape of the warmup; with "log", the learning rate rises fastest in the first steps."""
    relative: bool = False
    """Whether `warmup_min_lr` and `warmup_max_lr` are multiples of each param group's initial
    learning rate. If false, they are absolute learning rates."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        if self.warmup_max_lr is not None and exceeds(self.warmup_min_lr, self.warmup_max_lr):
            yield ParameterProblem(
                "warmup_min_lr",
                "`warmup_min_lr` must be at most `warmup_max_lr` "
                f"({_format_value(self.warmup_max_lr)}), got {_format_value(self.warmup_min_lr)}. "
                "Swap the two values.",
            )

    @property
    def span(self) -> int:
        return 2 * int(self.warmup_num_steps)

    def _curves(self, base: Base) -> Curves:
        own = base["lr"]
        minima = broadcast("warmup_min_lr", self.warmup_min_lr, own)
        if self.relative:
            minima = broadcast_lr(self, "warmup_min_lr", own)
        maxima = broadcast_lr(self, "warmup_max_lr", own)
        return {"lr": build_curve_per_group(self._curve, minima, maxima)}

    def _curve(self, minimum: float, maximum: float) -> Curve:
        return join(
            [self._warmup(minimum, maximum), self._curve_after_warmup(minimum, maximum)],
            boundaries=[as_number(self.warmup_num_steps)],
            names=("warmup", "after the warmup"),
        )

    def _warmup(self, minimum: float, maximum: float) -> Curve:
        ramp = log if self.warmup_type == "log" else linear
        return ramp(minimum, maximum, as_number(self.warmup_num_steps))

    def _curve_after_warmup(self, minimum: float, maximum: float) -> Curve:
        del minimum
        return constant(maximum)


@schedule_class
class WarmupDecayLR(
    WarmupLR, example={"total_num_steps": "1dur", "warmup_num_steps": 20, "warmup_type": "linear"}
):
    """Warmup, then linear decay to ``warmup_min_lr`` at step ``total_num_steps``.

    The warmup is the same as in `WarmupLR`. With N = ``warmup_num_steps`` and
    T = ``total_num_steps``, the decay for N <= k <= T is::

        lr(k) = warmup_max_lr + (warmup_min_lr - warmup_max_lr) * (k - N) / (T - N)

    After step T, the learning rate stays constant. If ``warmup_max_lr`` is null (the default), the
    maximum is the param group's initial learning rate. DeepSpeed's default is 0.001.

    >>> decay = WarmupDecayLR(total_num_steps=6, warmup_num_steps=2, warmup_type="linear")
    >>> list(decay.curves({"lr": (1.0,)})["lr"][0].values(8))
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    Source: ``WarmupDecayLR`` in deepspeed/runtime/lr_schedules.py.
    """

    total_num_steps: Annotated[Steps, _AUTO]
    """Length of the run, including the warmup."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        yield from super().find_problems()
        yield from _check_warmup_length(
            as_number(self.warmup_num_steps), as_number(self.total_num_steps)
        )

    @property
    def span(self) -> int:
        return int(self.total_num_steps) + 1

    def _curve_after_warmup(self, minimum: float, maximum: float) -> Curve:
        steps = as_number(self.total_num_steps) - as_number(self.warmup_num_steps)
        return linear(maximum, minimum, steps)


@schedule_class
class WarmupCosineLR(
    _DeepSpeedSchedule,
    example={"total_num_steps": "1dur", "warmup_num_steps": 20, "warmup_type": "linear"},
):
    """Warmup, then cosine decay to a fraction of each param group's initial learning rate.

    With N = ``warmup_num_steps``, T = ``total_num_steps``, c = ``cos_min_ratio`` and the function
    g(k) of `WarmupLR`, each param group's initial learning rate is multiplied by::

        ratio(k) = warmup_min_ratio + (1 - warmup_min_ratio) * g(k)      k <= N
                   c + (1 - c) * (1 + cos(pi * (k - N) / (T - N))) / 2   N <= k <= T

    The peak (ratio 1) is reached at k = N. In DeepSpeed, a linear warmup never reaches the peak,
    and the ratio of the first step is 0 instead of ``warmup_min_ratio``.

    >>> decay = WarmupCosineLR(total_num_steps=6, warmup_num_steps=2, warmup_type="linear")
    >>> [round(lr, 6) for lr in decay.curves({"lr": (1.0,)})["lr"][0].values(7)]
    [0.0, 0.5, 1.0, 0.853568, 0.50005, 0.146532, 0.0001]

    Source: ``WarmupCosineLR`` in deepspeed/runtime/lr_schedules.py.
    """

    total_num_steps: Annotated[Steps, _AUTO]
    """Length of the run, including the warmup."""
    warmup_min_ratio: Ratio = 0.0
    """Learning rate at the first step, as a fraction of the param group's initial learning rate."""
    warmup_num_steps: Annotated[WarmupSteps, _AUTO] = 1000
    """Length of the warmup."""
    cos_min_ratio: Ratio = 0.0001
    """Learning rate from step `total_num_steps` onward, as a fraction of the param group's initial
    learning rate."""
    warmup_type: WarmupType = "log"
    """Shape of the warmup; with "log", the learning rate rises fastest in the first steps."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        yield from _check_warmup_length(
            as_number(self.warmup_num_steps), as_number(self.total_num_steps)
        )

    @property
    def span(self) -> int:
        return int(self.total_num_steps) + 1

    def _curves(self, base: Base) -> Curves:
        return {"lr": build_curve_per_group(self._curve, base["lr"])}

    def _curve(self, peak: float) -> Curve:
        ramp = log if self.warmup_type == "log" else linear
        warmup = as_number(self.warmup_num_steps)
        steps = as_number(self.total_num_steps) - warmup
        return join(
            [
                ramp(self.warmup_min_ratio * peak, peak, warmup),
                cosine(peak, self.cos_min_ratio * peak, steps),
            ],
            boundaries=[warmup],
            names=("warmup", "cosine"),
        )


def _format_value(value: PerGroup) -> str:
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}"


def _check_warmup_length(warmup: float, total: float) -> Iterator[ParameterProblem]:
    if warmup > total:
        yield ParameterProblem(
            "warmup_num_steps",
            f"`warmup_num_steps` must be at most `total_num_steps` ({total}), got {warmup}. "
            "Shorten the warmup or increase `total_num_steps`.",
        )

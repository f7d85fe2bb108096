"""DeepSpeed's schedules, by its names: OneCycle, LRRangeTest and the three warmups.

Parameters, defaults and shapes are those of deepspeed/runtime/lr_schedules.py (0.19). Where they
differ in a value, the class says so, and docs/decisions/0003-deepspeed-schedules.md says why.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

from schedules.core.combinators import delay, join, stairs
from schedules.core.curves import Curve, constant, cosine, inverse_time, linear, linear_growth, log
from schedules.core.fields import (
    FilledIn,
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
from schedules.core.schedule import (
    Base,
    Curves,
    Fault,
    Schedule,
    broadcast,
    curve_per_group,
    exceeds,
    schedule_class,
    spread,
)

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

LastBatch = Annotated[int, Range(at_least=-1), "optimizer updates"]
_AUTO = FilledIn("transformers, accelerate")
_CYCLE = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 30}


@schedule_class
class _DeepSpeedSchedule(Schedule[int]):
    """What all five have: the position to begin at."""

    last_batch_iteration: LastBatch = -1
    """Index of the last update already done: the run begins at the next one. -1 begins at 0."""

    def curves(self, base: Base) -> Curves:
        done = self.last_batch_iteration + 1
        return {
            name: tuple(delay(curve, -done) for curve in group) if done else group
            for name, group in self._curves(base).items()
        }

    @abstractmethod
    def _curves(self, base: Base) -> Curves:
        """Return the curves as they are from update 0."""


@schedule_class
class OneCycle(
    _DeepSpeedSchedule,
    example=_CYCLE | {"cycle_first_stair_count": 6, "decay_step_size": 10, "decay_lr_rate": 0.5},
):
    """1Cycle: the learning rate climbs and descends once, momentum mirrors it, then both decay.

    With s climbing from 0 to 1 over ``first = cycle_first_step_size`` updates and back to 0 over
    ``second`` (continuously, or in equal stairs), and ``T = first + second``::

        lr(k)       = min_lr + (max_lr - min_lr) * s(k)                      k <= T
                      min_lr / (1 + decay_lr_rate * (k - T) / decay_step_size)      after
        momentum(k) = max_mom - (max_mom - min_mom) * s(k)                   k <= T
                      max_mom / (1 + decay_mom_rate * (k - T) / decay_step_size)    after

    The peak is ``cycle_max_lr`` exactly, at k = first. Momentum starts at its maximum and decays
    downwards; DeepSpeed starts one update at its minimum, raises it past 1, and sets beta2 to 0.99.

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
    cycle_max_lr: LearningRate
    """Learning rate at the peak, reached exactly after `cycle_first_step_size` updates."""
    decay_lr_rate: Rate = 0.0
    """What the learning rate's divisor, 1 at first, gains in each `decay_step_size` updates after
    the cycle."""
    cycle_first_step_size: Steps = 2000
    """Length of the first half, in which the learning rate climbs."""
    cycle_second_step_size: Steps | None = None
    """Length of the second half; null means as long as the first."""
    cycle_first_stair_count: StairCount = 0
    """Number of equal stairs in the first half; 0 climbs continuously."""
    cycle_second_stair_count: StairCount | None = None
    """Number of equal stairs in the second half; 0 descends continuously, null means as many as in
    the first."""
    decay_step_size: StepsOrZero | None = None
    """Updates in which the divisor of the decay after the cycle grows by the rate; 0 or null: no
    decay."""
    post_cycle_decay_step_size: StepsOrZero | None = None
    """Another name of `decay_step_size`, the one that DeepSpeed's tutorial uses."""
    cycle_momentum: bool = True
    """Whether momentum (betas[0] where an optimizer has betas) is cycled, inversely to the learning
    rate."""
    cycle_min_mom: Momentum = 0.8
    """Momentum at the peak of the learning rate."""
    cycle_max_mom: Momentum = 0.9
    """Momentum at the start and at the end of the cycle."""
    decay_mom_rate: Rate = 0.0
    """What the momentum's divisor, 1 at first, gains in each `decay_step_size` updates after the
    cycle."""

    def faults(self) -> Iterator[Fault]:
        for low, high in (("cycle_min_lr", "cycle_max_lr"), ("cycle_min_mom", "cycle_max_mom")):
            if exceeds(getattr(self, low), getattr(self, high)):
                yield Fault(
                    high,
                    f"`{high}` must be at least `{low}` ({_shown(getattr(self, low))}), but is "
                    f"{_shown(getattr(self, high))} instead; exchange the two.",
                )
        halves = [
            ("cycle_first_stair_count", self.cycle_first_stair_count, self._first_steps),
            ("cycle_second_stair_count", self._second_stairs, self._second_steps),
        ]
        wrong = [half for half in halves if half[1] > half[2]]
        if len(wrong) == 2 and self.cycle_second_stair_count is None:
            del wrong[1]  # a consequence of the first
        for name, count, steps in wrong:
            yield Fault(
                name,
                f"`{name}` must be at most the {steps} updates of its half, but is {count} "
                "instead; 0 makes the half continuous.",
            )
        if self.decay_step_size is not None and self.post_cycle_decay_step_size is not None:
            yield Fault(
                "post_cycle_decay_step_size",
                "`post_cycle_decay_step_size` must be absent where `decay_step_size` is given, of "
                "which it is another name, but both are given; keep one of them.",
            )

    @property
    def drives(self) -> tuple[str, ...]:
        return ("lr", "momentum") if self.cycle_momentum else ("lr",)

    @property
    def span(self) -> int:
        cycle = int(self._first_steps) + self._second_steps
        decays = self._decay_steps and (self.decay_lr_rate or self.decay_mom_rate)
        return cycle + (cycle // 2 if decays else 1)

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
        lr = base["lr"]
        curves = {
            "lr": curve_per_group(
                partial(self._cycle, self.decay_lr_rate),
                spread("cycle_min_lr", self.cycle_min_lr, lr),
                spread("cycle_max_lr", self.cycle_max_lr, lr),
            )
        }
        if self.cycle_momentum:
            momentum = base["momentum"]
            curves["momentum"] = curve_per_group(
                partial(self._cycle, self.decay_mom_rate),
                spread("cycle_max_mom", self.cycle_max_mom, momentum),
                spread("cycle_min_mom", self.cycle_min_mom, momentum),
            )
        return curves

    def _cycle(self, decay_rate: float, ends: float, middle: float) -> Curve:
        first, second = self._first_steps, self._second_steps
        there, back = linear(ends, middle, first), linear(middle, ends, second)
        if self.cycle_first_stair_count:
            there = stairs(there, first, self.cycle_first_stair_count)
        if self._second_stairs:
            back = stairs(back, second, self._second_stairs, rounds_up=True)
        after = constant(ends)
        if self._decay_steps and decay_rate:
            after = inverse_time(ends, decay_rate, self._decay_steps)
        names = ("first half", "second half", "after the cycle")
        return join([there, back, after], boundaries=[first, first + second], names=names)


@schedule_class
class LRRangeTest(
    _DeepSpeedSchedule,
    example={"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 20},
):
    """LR range test: the learning rate grows from small to too large, to see where training breaks.

    Continuously, or in one stair for each ``lr_range_test_step_size`` updates (x rounded down)::

        lr(k) = min_lr * (1 + step_rate * x),   x = k / step_size

    It has no end: whoever runs it decides when to stop.

    >>> test = LRRangeTest(lr_range_test_min_lr=0.1, lr_range_test_step_size=2)
    >>> [round(lr, 6) for lr in test.curves({"lr": (0.1,)})["lr"][0].values(5)]
    [0.1, 0.15, 0.2, 0.25, 0.3]

    Source: Smith, Cyclical learning rates for training neural networks,
    https://arxiv.org/abs/1506.01186, section 3.3; DeepSpeed's tutorial "Learning Rate Range Test".
    """

    lr_range_test_min_lr: LearningRate = 1e-3
    """Learning rate at the first update."""
    lr_range_test_step_size: Steps = 2000
    """Updates in which the learning rate grows by `lr_range_test_step_rate` times its minimum."""
    lr_range_test_step_rate: Rate = 1.0
    """How many times its minimum the learning rate gains in each `lr_range_test_step_size`
    updates."""
    lr_range_test_staircase: bool = False
    """Whether it grows in one stair for each `lr_range_test_step_size` updates instead of at each
    update."""

    @property
    def span(self) -> int:
        return 5 * int(self.lr_range_test_step_size)

    def _curves(self, base: Base) -> Curves:
        minima = spread("lr_range_test_min_lr", self.lr_range_test_min_lr, base["lr"])
        return {"lr": curve_per_group(self._growth, minima)}

    def _growth(self, minimum: float) -> Curve:
        steps = as_number(self.lr_range_test_step_size)
        growth = linear_growth(minimum, self.lr_range_test_step_rate, steps)
        return stairs(growth, steps, count=1) if self.lr_range_test_staircase else growth


WarmupType = Literal["log", "linear"]


@schedule_class
class WarmupLR(_DeepSpeedSchedule, example={"warmup_num_steps": 30, "warmup_type": "linear"}):
    """Warmup: the learning rate climbs from a minimum to a maximum and stays there.

    With N = ``warmup_num_steps``::

        lr(k) = min_lr + (max_lr - min_lr) * g(k)
        g(k)  = ln(1 + k) / ln(max(2, N))   "log"     at most 1
                k / N                       "linear"  at most 1

    The linear ramp is at its maximum at k = N exactly, the logarithmic one from k = N - 1 on.
    DeepSpeed is one update late: its first two updates both run at the minimum.

    >>> warmup = WarmupLR(warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    >>> list(warmup.curves({"lr": (1.0,)})["lr"][0].values(6))
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]

    Source: ``WarmupLR`` of deepspeed/runtime/lr_schedules.py.
    """

    warmup_min_lr: Annotated[LearningRate, _AUTO] = 0.0
    """Learning rate at the first update."""
    warmup_max_lr: Annotated[LearningRate | None, _AUTO] = None
    """Learning rate after the warmup; null means each group's own."""
    warmup_num_steps: Annotated[WarmupSteps, _AUTO] = 1000
    """Length of the warmup."""
    warmup_type: WarmupType = "log"
    """Shape of the warmup. "log" climbs most of the way in its first few updates."""

    def faults(self) -> Iterator[Fault]:
        if self.warmup_max_lr is not None and exceeds(self.warmup_min_lr, self.warmup_max_lr):
            yield Fault(
                "warmup_min_lr",
                f"`warmup_min_lr` must be at most `warmup_max_lr` ({_shown(self.warmup_max_lr)}), "
                f"but is {_shown(self.warmup_min_lr)} instead; exchange the two.",
            )

    @property
    def span(self) -> int:
        return 2 * int(self.warmup_num_steps)

    def _curves(self, base: Base) -> Curves:
        own = base["lr"]
        minima = broadcast("warmup_min_lr", self.warmup_min_lr, own)
        maxima = own
        if self.warmup_max_lr is not None:
            maxima = spread("warmup_max_lr", self.warmup_max_lr, own)
        return {"lr": curve_per_group(self._from_to, minima, maxima)}

    def _from_to(self, minimum: float, maximum: float) -> Curve:
        return join(
            [self._warmup(minimum, maximum), self._after(minimum, maximum)],
            boundaries=[as_number(self.warmup_num_steps)],
            names=("warmup", "after the warmup"),
        )

    def _warmup(self, minimum: float, maximum: float) -> Curve:
        ramp = log if self.warmup_type == "log" else linear
        return ramp(minimum, maximum, as_number(self.warmup_num_steps))

    def _after(self, minimum: float, maximum: float) -> Curve:
        del minimum
        return constant(maximum)


@schedule_class
class WarmupDecayLR(
    WarmupLR, example={"total_num_steps": "1dur", "warmup_num_steps": 20, "warmup_type": "linear"}
):
    """Warmup, then a straight decay to the minimum at the end of the run, held from there on.

    With N = ``warmup_num_steps`` and T = ``total_num_steps``, after the warmup of `WarmupLR`::

        lr(k) = max_lr + (min_lr - max_lr) * (k - N) / (T - N),   N <= k <= T

    >>> decay = WarmupDecayLR(total_num_steps=6, warmup_num_steps=2, warmup_type="linear")
    >>> list(decay.curves({"lr": (1.0,)})["lr"][0].values(8))
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    An absent ``warmup_max_lr`` is the group's own learning rate; DeepSpeed's is 0.001.

    Source: ``WarmupDecayLR`` of deepspeed/runtime/lr_schedules.py.
    """

    total_num_steps: Annotated[Steps, _AUTO]
    """Length of the run, warmup included."""

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        yield from _warmup_outlasts(
            as_number(self.warmup_num_steps), as_number(self.total_num_steps)
        )

    @property
    def span(self) -> int:
        return int(self.total_num_steps) + 1

    def _after(self, minimum: float, maximum: float) -> Curve:
        steps = as_number(self.total_num_steps) - as_number(self.warmup_num_steps)
        return linear(maximum, minimum, steps)


@schedule_class
class WarmupCosineLR(
    _DeepSpeedSchedule,
    example={"total_num_steps": "1dur", "warmup_num_steps": 20, "warmup_type": "linear"},
):
    """Warmup, then half a cosine wave down to a share of each group's own learning rate.

    With N = ``warmup_num_steps``, T = ``total_num_steps``, c = ``cos_min_ratio``, and the warmup's
    g(k) of `WarmupLR`, every group's own learning rate is multiplied by::

        ratio(k) = warmup_min_ratio + (1 - warmup_min_ratio) * g(k)              k <= N
                   c + (1 - c) * (1 + cos(pi * (k - N) / (T - N))) / 2           N <= k <= T

    The peak, ratio 1, is in force at k = N. DeepSpeed never comes to it with a linear warmup, and
    starts at 0 whatever ``warmup_min_ratio`` says.

    >>> decay = WarmupCosineLR(total_num_steps=6, warmup_num_steps=2, warmup_type="linear")
    >>> [round(lr, 6) for lr in decay.curves({"lr": (1.0,)})["lr"][0].values(7)]
    [0.0, 0.5, 1.0, 0.853568, 0.50005, 0.146532, 0.0001]

    Source: ``WarmupCosineLR`` of deepspeed/runtime/lr_schedules.py.
    """

    total_num_steps: Annotated[Steps, _AUTO]
    """Length of the run, warmup included."""
    warmup_min_ratio: Ratio = 0.0
    """Share of the learning rate at the first update."""
    warmup_num_steps: Annotated[WarmupSteps, _AUTO] = 1000
    """Length of the warmup."""
    cos_min_ratio: Ratio = 0.0001
    """Share of the learning rate at the end, held from there on."""
    warmup_type: WarmupType = "log"
    """Shape of the warmup. "log" climbs most of the way in its first few updates."""

    def faults(self) -> Iterator[Fault]:
        yield from _warmup_outlasts(
            as_number(self.warmup_num_steps), as_number(self.total_num_steps)
        )

    @property
    def span(self) -> int:
        return int(self.total_num_steps) + 1

    def _curves(self, base: Base) -> Curves:
        return {"lr": curve_per_group(self._from_peak, base["lr"])}

    def _from_peak(self, peak: float) -> Curve:
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


def _shown(value: PerGroup) -> str:
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}"


def _warmup_outlasts(warmup: float, total: float) -> Iterator[Fault]:
    if warmup > total:
        yield Fault(
            "warmup_num_steps",
            f"`warmup_num_steps` must be at most `total_num_steps` ({total}), but is {warmup} "
            "instead; the run would end before its warmup.",
        )

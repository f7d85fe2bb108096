"""Megatron-LM's scheduler, with Megatron-LM's parameter names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

from schedules.core.combinators import join, pointwise
from schedules.core.controller import Base, Curves
from schedules.core.curves import (
    Curve,
    constant,
    cosine,
    half_life,
    inverse_sqrt,
    linear,
    one_minus_sqrt,
)
from schedules.core.fields import (
    LearningRate,
    PerGroup,
    Steps,
    StepsOrZero,
    WarmupStepsOrZero,
    WeightDecay,
    as_number,
)
from schedules.core.per_group import broadcast_strict, build_curve_per_group, exceeds
from schedules.core.schedule import ParameterProblem, Schedule, schedule_class

__all__ = ["OptimizerParamScheduler"]


@schedule_class
class OptimizerParamScheduler(
    Schedule[int],
    example={
        "max_lr": 0.1,
        "lr_warmup_steps": 10,
        "lr_decay_steps": 90,
        "lr_decay_style": "cosine",
        "end_wd": 0.1,
        "wd_incr_steps": 90,
    },
):
    """Megatron-LM's scheduler: learning rate warmup and decay, and an increasing weight decay.

    Unlike in Megatron-LM, durations are in optimizer steps, not in samples. The decay ends at step
    ``lr_decay_steps`` of the run, and the learning rate stays at ``min_lr`` afterwards. With
    ``lr_decay_style`` "WSD", the decay takes ``wsd_decay_steps`` steps, and the learning rate stays
    at ``max_lr`` between the warmup and the decay. With "constant", there is no decay.

    As in Megatron-LM, a param group can have its own ``max_lr``, ``min_lr``, ``start_wd`` and
    ``end_wd``, which override the schedule's parameters for this group.

    Source: ``OptimizerParamScheduler`` in megatron/core/optimizer_param_scheduler.py.
    """

    has_rate_per_step = True
    group_keys = ("max_lr", "min_lr", "start_wd", "end_wd")

    init_lr: LearningRate = 0.0
    """Learning rate at the first step of the warmup."""
    max_lr: LearningRate
    """Learning rate at the end of the warmup."""
    min_lr: LearningRate = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_steps: WarmupStepsOrZero = 0
    """Length of the warmup."""
    lr_decay_steps: Steps
    """Step at which the decay ends, counted from the start of the warmup."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay after the warmup."""
    wsd_decay_steps: Steps | None = None
    """Length of the decay. Must be set if and only if `lr_decay_style` is "WSD"."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    """Shape of the decay if `lr_decay_style` is "WSD"."""
    start_wd: WeightDecay | None = None
    """Weight decay at the start; null means 0 if `end_wd` is set."""
    end_wd: WeightDecay | None = None
    """Weight decay from step `wd_incr_steps` onward. If this key and `start_wd` are both
    null, the schedule does not change the weight decay."""
    wd_incr_steps: StepsOrZero = 0
    """Step at which the weight decay reaches `end_wd`."""
    wd_incr_style: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the weight-decay curve from `start_wd` to `end_wd`."""

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        return ("lr",) if self._weight_decays is None else ("lr", "weight_decay")

    @property
    def _weight_decays(self) -> tuple[PerGroup, PerGroup] | None:
        """Initial and final weight decay; None if the schedule does not change the weight decay."""
        if self.start_wd is None and self.end_wd is None:
            return None
        return self.start_wd or 0.0, self.end_wd or 0.0

    @property
    def length(self) -> int:
        return math.ceil(max(as_number(self.lr_decay_steps), as_number(self.wd_incr_steps)))

    def find_problems(self) -> Iterator[ParameterProblem]:
        warmup, end = as_number(self.lr_warmup_steps), as_number(self.lr_decay_steps)
        if warmup >= end:
            yield ParameterProblem(
                "lr_warmup_steps",
                f"`lr_warmup_steps` must be less than `lr_decay_steps` ({end:g}), got {warmup:g}. "
                "Shorten the warmup or increase `lr_decay_steps`.",
            )
        if exceeds(self.init_lr, self.max_lr) or exceeds(self.min_lr, self.max_lr):
            yield ParameterProblem(
                "max_lr",
                f"`max_lr` must be at least `init_lr` ({self.init_lr}) and `min_lr` "
                f"({self.min_lr}), got {self.max_lr}. Increase `max_lr` or lower the others.",
            )
        yield from self._find_weight_decay_problems()
        is_wsd = self.lr_decay_style == "WSD"
        if is_wsd and self.wsd_decay_steps is None:
            yield ParameterProblem(
                "wsd_decay_steps",
                '`wsd_decay_steps` must be set if `lr_decay_style` is "WSD", got null. '
                "Set it to the length of the decay.",
            )
        elif self.wsd_decay_steps is not None and not is_wsd:
            yield ParameterProblem(
                "wsd_decay_steps",
                f'`wsd_decay_steps` must be null unless `lr_decay_style` is "WSD", got '
                f'{self.wsd_decay_steps}. Remove the key, or set "lr_decay_style": "WSD".',
            )
        elif (anneal := as_number(self.wsd_decay_steps or 0)) and anneal > end - warmup:
            yield ParameterProblem(
                "wsd_decay_steps",
                f"`wsd_decay_steps` must be at most {end - warmup:g}, the difference between "
                f"`lr_decay_steps` and `lr_warmup_steps`, got {anneal:g}. Use a smaller value.",
            )

    def _find_weight_decay_problems(self) -> Iterator[ParameterProblem]:
        if self._weight_decays is None:
            if self.wd_incr_steps:
                yield ParameterProblem(
                    "wd_incr_steps",
                    "`wd_incr_steps` has no effect without `end_wd`. Set `end_wd`, or remove "
                    "`wd_incr_steps`.",
                )
            return
        start, end = self._weight_decays
        if exceeds(start, end):
            yield ParameterProblem(
                "end_wd",
                f"`end_wd` must be at least `start_wd` ({start}), got {end}. Swap the two values.",
            )
        if self.wd_incr_style == "constant" and start != end:
            yield ParameterProblem(
                "wd_incr_style",
                '`wd_incr_style` must not be "constant" if `start_wd` and `end_wd` differ. '
                'Set it to "linear" or "cosine".',
            )

    def curves(self, base: Base) -> Curves:
        each = self.per_group(len(base["lr"]))
        broadcast_strict("max_lr", self.max_lr, base["lr"])
        curves = {"lr": build_curve_per_group(OptimizerParamScheduler._lr_curve, each)}
        if self._weight_decays is not None:
            broadcast_strict("end_wd", self._weight_decays[1], base["weight_decay"])
            decay = OptimizerParamScheduler._weight_decay_curve
            curves["weight_decay"] = build_curve_per_group(decay, each)
        return curves

    def _weight_decay_curve(self) -> Curve:
        shape = cosine if self.wd_incr_style == "cosine" else linear
        return shape(
            as_number(self.start_wd or 0.0),
            as_number(self.end_wd or 0.0),
            as_number(self.wd_incr_steps),
        )

    def _lr_curve(self) -> Curve:
        warmup, end = as_number(self.lr_warmup_steps), as_number(self.lr_decay_steps)
        high, low = as_number(self.max_lr), as_number(self.min_lr)
        steps = end - warmup
        climb = linear(as_number(self.init_lr), high, warmup)
        match self.lr_decay_style:
            case "constant":
                return join([climb, constant(high)], [warmup], names=("warmup", "constant"))
            case "linear":
                return join([climb, linear(high, low, steps)], [warmup], names=("warmup", "decay"))
            case "cosine":
                return join([climb, cosine(high, low, steps)], [warmup], names=("warmup", "decay"))
            case "WSD":
                anneal = as_number(self.wsd_decay_steps or 0)
                shapes: dict[str, Callable[[float, float, float], Curve]] = {
                    "linear": linear,
                    "cosine": cosine,
                    "exponential": half_life,
                    "minus_sqrt": one_minus_sqrt,
                }
                shape = shapes[self.lr_wsd_decay_style]
                decay = shape(high, low, anneal)
                parts = [climb, constant(high), decay]
                return join(parts, [warmup, end - anneal], names=("warmup", "stable", "decay"))
        # In Megatron-LM, the factor 1 / sqrt(…) is 1 at the end of the warmup.
        scale = max(warmup, 1)
        root = inverse_sqrt(high, steps=scale)
        # Megatron-LM still uses this factor at step `end`, and uses `min_lr` from the next step on.
        # The other styles reach `min_lr` at step `end`.
        parts = [climb, pointwise(max, root, constant(low)), constant(low)]
        return join(parts, [warmup, end + 1], names=("warmup", "decay", "end"))

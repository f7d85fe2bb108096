"""Bounds of a schedule's values that follow from its parameters."""

import math
from collections.abc import Callable
from typing import Any

from schedules import Schedule

Levels = tuple[float, ...]
"""Values of which the lowest and the highest are the bounds of a hyperparameter."""

UNBOUNDED = {"ChainedScheduler", "Combined", "SequentialLR"}
"""Schedules whose parameters do not define bounds."""


def _factor(gamma: float, peak: float) -> Levels:
    return (peak, 0.0) if gamma <= 1 else (peak, math.inf)


def _or_default(value: float | None, lr: float) -> float:
    return lr if value is None else value


def _mxnet(s: Any, lr: float, *ends: float) -> Levels:
    begin = (s.warmup_begin_lr,) if s.warmup_steps else ()
    return (_or_default(s.base_lr, lr), *begin, *ends)


def _composer(s: Any, lr: float) -> Levels:
    first = getattr(s, "alpha_i", 1.0) * lr
    return (first, s.alpha_f * lr, 0.0 if hasattr(s, "t_warmup") else first)


def _sambaflow(s: Any, lr: float) -> Levels:
    peak = _or_default(s.learning_rate, lr)
    return (peak, s.end_lr_ratio * peak, 0.0 if s.warmup_steps else peak)


def _phases(s: Any, lr: float) -> Levels:
    unit = lr if s.relative else 1.0
    phases = s.lr or ()
    return (lr, *(unit * phase[key] for phase in phases for key in ("from", "to") if key in phase))


LR_LEVELS: dict[str, Callable[[Any, float], Levels]] = {
    "LRRangeTest": lambda s, lr: (s.lr_range_test_min_lr, math.inf),
    "OneCycle": lambda s, lr: (
        s.cycle_min_lr,
        _or_default(s.cycle_max_lr, lr),
        0.0 if s.decay_lr_rate else s.cycle_min_lr,
    ),
    "WarmupCosineLR": lambda s, lr: (lr, s.warmup_min_ratio * lr, s.cos_min_ratio * lr),
    "WarmupDecayLR": lambda s, lr: (s.warmup_min_lr, _or_default(s.warmup_max_lr, lr), 0.0),
    "WarmupLR": lambda s, lr: (s.warmup_min_lr, _or_default(s.warmup_max_lr, lr)),
    "ConstantScheduler": lambda s, lr: (lr, s.alpha * lr),
    "ConstantWithWarmupScheduler": lambda s, lr: (0.0, s.alpha * lr),
    "CosineAnnealingScheduler": _composer,
    "CosineAnnealingWarmRestartsScheduler": _composer,
    "CosineAnnealingWithWarmupScheduler": _composer,
    "LinearScheduler": _composer,
    "LinearWithWarmupScheduler": _composer,
    "PolynomialScheduler": _composer,
    "PolynomialWithWarmupScheduler": _composer,
    "ExponentialScheduler": lambda s, lr: _factor(s.gamma, lr),
    "MultiStepScheduler": lambda s, lr: _factor(s.gamma, lr),
    "MultiStepWithWarmupScheduler": lambda s, lr: (0.0, *_factor(s.gamma, lr)),
    "StepScheduler": lambda s, lr: _factor(s.gamma, lr),
    "ConstantLR": lambda s, lr: (lr, s.factor * lr),
    "CosineAnnealingLR": lambda s, lr: (lr, s.eta_min),
    "CosineAnnealingWarmRestarts": lambda s, lr: (lr, s.eta_min),
    "CyclicLR": lambda s, lr: (
        s.base_lr,
        peak := _or_default(s.max_lr, lr),
        *_factor(s.gamma, peak)[s.gamma <= 1 :],
    ),
    "ExponentialLR": lambda s, lr: _factor(s.gamma, lr),
    "LinearLR": lambda s, lr: (s.start_factor * lr, s.end_factor * lr),
    "MultiStepLR": lambda s, lr: _factor(s.gamma, lr),
    "OneCycleLR": lambda s, lr: (
        peak := _or_default(s.max_lr, lr),
        peak / s.div_factor,
        peak / s.div_factor / s.final_div_factor,
    ),
    "PolynomialLR": lambda s, lr: (lr, 0.0),
    "StepLR": lambda s, lr: _factor(s.gamma, lr),
    "CosineScheduler": lambda s, lr: _mxnet(s, lr, s.final_lr),
    "FactorScheduler": lambda s, lr: _mxnet(s, lr, s.stop_factor_lr, *_factor(s.factor, lr)[1:]),
    "MultiFactorScheduler": lambda s, lr: _mxnet(s, lr, *_factor(s.factor, lr)[1:]),
    "PolyScheduler": lambda s, lr: _mxnet(s, lr, s.final_lr),
    "SquareRootScheduler": lambda s, lr: _mxnet(s, lr, 0.0),
    "cosine_schedule_with_warmup": _sambaflow,
    "polynomial_decay_schedule_with_warmup": _sambaflow,
    "fixed_lr": lambda s, lr: (_or_default(s.learning_rate, lr),),
    "step_schedule": lambda s, lr: _factor(s.gamma, _or_default(s.learning_rate, lr)),
    "InverseSquareRoot": lambda s, lr: (lr, 0.0),
    "Phases": _phases,
    "WarmupStableDecay": lambda s, lr: (
        lr,
        s.min_lr_ratio * lr,
        0.0 if s.warmup_steps else lr,
    ),
    "OptimizerParamScheduler": lambda s, lr: (s.init_lr, s.max_lr, s.min_lr),
    "AutoWU": lambda s, lr: (0.0, s.max_lr),
    "ReduceLROnPlateau": lambda s, lr: (lr, 0.0 if s.warmup_steps else min(s.min_lr, lr)),
}
OTHER_LEVELS: dict[tuple[str, str], Callable[[Any], Levels]] = {
    ("OneCycle", "momentum"): lambda s: (
        s.cycle_min_mom,
        s.cycle_max_mom,
        0.0 if s.decay_mom_rate else s.cycle_min_mom,
    ),
    ("CyclicLR", "momentum"): lambda s: (s.base_momentum, s.max_momentum),
    ("OneCycleLR", "momentum"): lambda s: (s.base_momentum, s.max_momentum),
    ("OptimizerParamScheduler", "weight_decay"): lambda s: (s.start_wd or 0, s.end_wd or 0),
}


def bounds_of(schedule: Schedule[Any], name: str, lr: float) -> tuple[float, float]:
    """Return the lowest and the highest value that a schedule's parameters allow.

    Args:
        schedule: resolved schedule of one param group.
        name: hyperparameter that the schedule sets.
        lr: base learning rate of the group.
    """
    if name == "lr" and schedule.type_name not in UNBOUNDED:
        is_relative = getattr(schedule, "relative", False) and schedule.type_name != "Phases"
        unit = lr if is_relative else 1.0
        levels = [unit * each for each in LR_LEVELS[schedule.type_name](schedule, lr / unit)]
    else:
        of_others = OTHER_LEVELS.get((schedule.type_name, name))
        levels = (0.0, math.inf) if of_others is None else of_others(schedule)
    return min(levels), max(levels)

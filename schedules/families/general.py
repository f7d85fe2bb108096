"""General-purpose schedules: multi-phase, warmup-stable-decay and inverse square root."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from schedules.core.combinators import join, linear_warmup
from schedules.core.controller import Base, Curves
from schedules.core.curves import (
    Curve,
    constant,
    cosine,
    geometric,
    half_life,
    inverse_sqrt,
    inverse_sqrt_ramp,
    linear,
    one_minus_sqrt,
    polynomial,
)
from schedules.core.durations import PATTERN, Horizon, convert_to_steps, is_time_string
from schedules.core.fields import (
    Items,
    Ratio,
    Steps,
    WarmupStepsOrZero,
    as_number,
)
from schedules.core.per_group import are_equal, build_curve_per_group
from schedules.core.schedule import (
    Joint,
    LearningRateSchedule,
    ParameterProblem,
    Schedule,
    schedule_class,
)

__all__ = [
    "InverseSquareRoot",
    "Phases",
    "WarmupStableDecay",
]

Ramp = Callable[[float, float, float], Curve]


def _quadratic(start: float, end: float, steps: float) -> Curve:
    return polynomial(start, end, steps, power=2.0)


SHAPES: Mapping[str, Ramp] = {
    "constant": lambda start, end, steps: constant(start),
    "linear": linear,
    "cosine": cosine,
    "polynomial": _quadratic,
    "exponential": geometric,
    "half-life": half_life,
    "1-sqrt": one_minus_sqrt,
    "inverse-sqrt": inverse_sqrt_ramp,
}
"""Maps each shape to a function that builds a phase from its start value, end value and length."""

_NEVER_ZERO = ("exponential", "inverse-sqrt")
"""Shapes whose start and end values must not be 0."""

_PHASE = {
    "type": "object",
    "properties": {
        "shape": {"type": "string", "enum": list(SHAPES)},
        "from": {"type": "number", "minimum": 0},
        "to": {"type": "number", "minimum": 0},
        "duration": {"type": ["integer", "number", "string"], "pattern": PATTERN, "minimum": 0},
        "warmup": {"type": "boolean"},
    },
    "required": ["duration"],
    "additionalProperties": False,
}
PhaseList = Annotated[Sequence[Mapping[str, Any]], Items(_PHASE)]


@schedule_class
class Phases(
    Schedule[int],
    example={
        "lr": [
            {"from": 0.0, "to": 0.1, "duration": "0.2dur"},
            {"duration": "0.3dur"},
            {"shape": "cosine", "to": 0.02, "duration": "0.5dur"},
        ],
        "weight_decay": [{"from": 0.0, "to": 0.1, "duration": "1dur"}],
    },
):
    """Change hyperparameters in phases, each from a start value to an end value.

    A phase is ``{"shape": …, "from": …, "to": …, "duration": …}``. "shape" is "linear" (the
    default), "constant", "cosine", "polynomial" (quadratic), "exponential" (linear on a log scale),
    "half-life" (Megatron-LM's exponential decay), "1-sqrt" (1 minus square root) or "inverse-sqrt"
    (``from / sqrt(1 + c * x)``, where x goes from 0 to 1, and c makes the phase end at "to").
    "from" defaults to the end value of the previous phase or, in the first phase, to the param
    group's initial value. "to" defaults to "from". After the last phase, the value stays constant.

    To reproduce the decay of Vaswani et al., ``peak * sqrt(W / k)`` after a warmup of W steps, use
    an "inverse-sqrt" phase of N steps from peak to ``peak * sqrt(W / (W + N))``.

    ``engine.scale_schedule_ratio`` scales a phase marked with ``"warmup": true`` only if the
    phase's duration is a fraction of the run or ``engine.scale_warmup`` is true.

    >>> phases = Phases(lr=[{"from": 0, "to": 1, "duration": 2}, {"to": 0, "duration": 4}])
    >>> list(phases.curves({"lr": (0.1,)})["lr"][0].values(8))
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    lr: PhaseList | None = None
    """Phases of the learning rate; null leaves it unchanged."""
    momentum: PhaseList | None = None
    """Phases of the momentum (betas[0] if the optimizer has betas); null leaves it unchanged."""
    weight_decay: PhaseList | None = None
    """Phases of the weight decay; null leaves it unchanged."""
    relative: bool = False
    """Whether "from" and "to" are multiples of the param group's initial value. If false,
    they are absolute values."""

    def _convert_fields(self) -> Iterator[ParameterProblem]:
        yield from super()._convert_fields()
        if not self.hyperparameters:
            yield ParameterProblem(
                None,
                "`lr`, `momentum` or `weight_decay` must be set, but all are null. "
                "Set at least one to a list of phases.",
            )

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        names = ("lr", "momentum", "weight_decay")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def length(self) -> int:
        phases = (getattr(self, name) for name in self.hyperparameters)
        totals: Iterator[float] = (sum(each["duration"] for each in part) for part in phases)
        return math.ceil(max(totals))

    @property
    def span(self) -> int:
        return self.length + 1

    def joints(self) -> Iterator[Joint]:
        for name in self.hyperparameters:
            durations = [phase["duration"] for phase in getattr(self, name)[:-1]]
            for index, step in enumerate(itertools.accumulate(durations), start=1):
                fix = f'Remove the key "from" of phase {index} to continue from the previous phase.'
                yield Joint(name, step, name, fix)

    @property
    def unresolved_fields(self) -> tuple[str, ...]:
        return tuple(
            name
            for name in self.hyperparameters
            if any(is_time_string(phase["duration"]) for phase in getattr(self, name))
        )

    def _durations(self, horizon: Horizon) -> Iterator[tuple[str, Callable[[], Any]]]:
        for name in self.hyperparameters:
            yield name, partial(_resolve_durations, getattr(self, name), horizon)

    def find_problems(self) -> Iterator[ParameterProblem]:
        for name in self.hyperparameters:
            previous = None  # The first phase starts at the param group's value, unknown here.
            for index, phase in enumerate(getattr(self, name)):
                start = phase.get("from", previous)
                previous = phase.get("to", start)
                ends = [end for end in (start, previous) if end is not None]
                yield from self._find_phase_problems(f"{name}[{index}]", name, phase, ends)

    def _find_phase_problems(
        self, path: str, name: str, phase: Mapping[str, Any], ends: Sequence[float]
    ) -> Iterator[ParameterProblem]:
        if phase["duration"] <= 0:
            yield ParameterProblem(
                name, f"`{path}.duration` must be at least 1 step, got 0. Set a longer duration."
            )
        if name == "momentum" and not self.relative and any(end >= 1 for end in ends):
            yield ParameterProblem(
                name,
                f"`from` and `to` of `{path}` must be less than 1, got {max(ends):g}. Use smaller "
                "values.",
            )
        if phase.get("shape") in _NEVER_ZERO and 0 in ends:
            yield ParameterProblem(
                name,
                f"`{path}` must not start or end at 0, because its shape is {phase['shape']}. "
                "Use a small positive value.",
            )

    def curves(self, base: Base) -> Curves:
        for name in self.hyperparameters:
            if not self.relative and any("to" in phase for phase in getattr(self, name)):
                self._check_groups_stay_different(name, base[name])
        return {
            name: build_curve_per_group(
                partial(self._join_phases, name, getattr(self, name)), base[name]
            )
            for name in self.hyperparameters
        }

    def _check_groups_stay_different(self, name: str, own: tuple[float, ...]) -> None:
        if not are_equal(own):
            groups = ", ".join(f"group {index}: {value:g}" for index, value in enumerate(own))
            raise ValueError(
                f"`{name}` must use relative values, because the param groups have different "
                f'initial values ({groups}). Set "relative": true, and set "from" and "to" to '
                "multiples of the initial values."
            )

    def _join_phases(self, name: str, phases: Sequence[Mapping[str, Any]], own: float) -> Curve:
        if self.relative and own == 0:
            return constant(0.0)  # also if a shape does not allow 0
        unit = own if self.relative else 1.0
        value, parts = own, []
        for phase in phases:
            start = phase["from"] * unit if "from" in phase else value
            value = phase["to"] * unit if "to" in phase else start
            if phase.get("shape") in _NEVER_ZERO and 0 in (start, value):
                raise ValueError(
                    f"A phase of `{name}` with the shape {phase['shape']} must not start or end at "
                    f"0, but one goes from {start:g} to {value:g} in a param group whose "
                    f"initial {name} is {own:g}. Use a small positive value instead of 0."
                )
            if name == "momentum" and max(start, value) >= 1:
                raise ValueError(
                    f"`momentum` must be less than 1, but a phase goes from {start:g} to {value:g} "
                    f"in a param group whose initial momentum is {own:g}. Lower `from` or `to`."
                )
            parts.append(SHAPES[phase.get("shape", "linear")](start, value, phase["duration"]))
        boundaries = itertools.accumulate(phase["duration"] for phase in phases[:-1])
        names = [
            "constant" if phase.get("to") is None else phase.get("shape", "linear")
            for phase in phases
        ]
        return join(parts, boundaries=boundaries, names=names)


def _resolve_durations(phases: Sequence[Mapping[str, Any]], horizon: Horizon) -> tuple[Any, ...]:
    resolved = []
    for phase in phases:
        scaled = horizon.scale_warmup or not phase.get("warmup", False)
        resolved.append(
            {**phase, "duration": convert_to_steps(phase["duration"], horizon, scaled=scaled)}
        )
    return tuple(resolved)


@schedule_class
class WarmupStableDecay(
    LearningRateSchedule,
    example={"warmup_steps": 10, "total_steps": "1dur", "decay_steps": "0.3dur"},
):
    """Warmup-stable-decay (WSD): linear warmup, constant learning rate, and decay at the end.

    The decay takes place over the last ``decay_steps`` steps of the run and ends at
    ``min_lr_ratio`` times the initial learning rate. After ``total_steps``, the learning rate stays
    at this value.

    >>> wsd = WarmupStableDecay(warmup_steps=2, total_steps=8, decay_steps=4)
    >>> list(wsd.curves({"lr": (1.0,)})["lr"][0].values(9))
    [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    Source: Hu et al., MiniCPM, https://arxiv.org/abs/2404.06395.
    """

    warmup_steps: WarmupStepsOrZero = 0
    """Length of the warmup."""
    total_steps: Steps
    """Length of the run, including the warmup and the decay."""
    decay_steps: Steps
    """Length of the decay."""
    decay_type: Literal["linear", "cosine", "1-sqrt", "half-life"] = "linear"
    """Shape of the decay at the end of the run."""
    min_lr_ratio: Ratio = 0.0
    """Learning rate at the end of the decay as a fraction of the initial learning rate."""
    one_based_warmup: bool = False
    """Whether to count warmup steps from 1. If true, the learning rate at step k is multiplied by
    (k + 1) / warmup_steps instead of k / warmup_steps, so it is not 0 at the first step, and the
    warmup ends one step earlier."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        needed, total = self._warmup + self._decay, as_number(self.total_steps)
        if needed > total:
            yield ParameterProblem(
                "decay_steps",
                f"`warmup_steps` plus `decay_steps` must be at most `total_steps` ({total:g}), got "
                f"{needed:g}. Shorten the warmup or the decay.",
            )

    @property
    def _warmup(self) -> float:
        return as_number(self.warmup_steps)

    @property
    def _decay(self) -> float:
        return as_number(self.decay_steps)

    def curve(self, lr: float) -> Curve:
        decay_start = as_number(self.total_steps) - self._decay
        return join(
            [
                linear_warmup(lr, self._warmup, one_based=self.one_based_warmup),
                constant(lr),
                SHAPES[self.decay_type](lr, self.min_lr_ratio * lr, self._decay),
            ],
            boundaries=[self._warmup, decay_start],
            names=("warmup", "stable", "decay"),
        )


@schedule_class
class InverseSquareRoot(LearningRateSchedule, example={"warmup_steps": 10}):
    """Linear warmup, then inverse square root decay.

    ::

        lr(k) = lr * k / warmup_steps                           k < warmup_steps
                lr / sqrt(1 + (k - warmup_steps) / timescale)   k >= warmup_steps

    Source: Zhai et al., Scaling vision transformers, https://arxiv.org/abs/2106.04560; Vaswani et
    al., https://arxiv.org/abs/1706.03762 (where `timescale` is `warmup_steps`).
    """

    warmup_steps: WarmupStepsOrZero = 0
    """Length of the warmup."""
    timescale: Steps | None = None
    """Interval from the end of the warmup until the learning rate has fallen to 1 / sqrt(2)
    of its peak; null uses `warmup_steps`."""
    one_based_warmup: bool = False
    """Whether to count warmup steps from 1. If true, the learning rate at step k is multiplied by
    (k + 1) / warmup_steps instead of k / warmup_steps, so it is not 0 at the first step, and the
    warmup ends one step earlier."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        if not (self.timescale or self.warmup_steps):
            yield ParameterProblem(
                "timescale",
                "`timescale` must be set if `warmup_steps` is 0. Set `timescale`, or increase "
                "`warmup_steps`.",
            )

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.warmup_steps)
        decay = inverse_sqrt(lr, as_number(self.timescale or steps))
        warmup = linear_warmup(lr, steps, one_based=self.one_based_warmup)
        return join([warmup, decay], boundaries=[steps], names=("warmup", "decay"))

"""General schedules: phases, warmup-stable-decay and the inverse square root."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from schedules.core.combinators import join
from schedules.core.curves import (
    Curve,
    constant,
    cosine,
    geometric,
    half_life,
    inverse_sqrt,
    linear,
    one_minus_sqrt,
    polynomial,
)
from schedules.core.durations import PATTERN, Horizon, is_unresolved, steps_of
from schedules.core.fields import (
    Items,
    Ratio,
    Steps,
    WarmupStepsOrZero,
    as_number,
)
from schedules.core.schedule import (
    Base,
    Curves,
    Fault,
    LearningRateSchedule,
    Schedule,
    schedule_class,
)

__all__ = [
    "InverseSquareRoot",
    "Phases",
    "WarmupStableDecay",
]

Ramp = Callable[[float, float, float], Curve]


def _square(begin: float, end: float, steps: float) -> Curve:
    return polynomial(begin, end, steps, power=2.0)


SHAPES: Mapping[str, Ramp] = {
    "constant": lambda begin, end, steps: constant(begin),
    "linear": linear,
    "cosine": cosine,
    "polynomial": _square,
    "exponential": geometric,
    "half-life": half_life,
    "1-sqrt": one_minus_sqrt,
}
"""The shapes of a phase: from its first value to its last in some steps."""

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
    """Any curve, phase by phase: each from one value to another in a shape, for a duration.

    A phase is ``{"shape": …, "from": …, "to": …, "duration": …}``. The shape is "linear" unless it
    says "constant", "cosine", "polynomial" (squared), "exponential" (straight on a log scale),
    "half-life" or "1-sqrt". "from" is where the phase before ended, or the group's own value; "to"
    is "from". ``"warmup": true`` keeps a scale schedule ratio from the phase. The end is held.

    >>> phases = Phases(lr=[{"from": 0, "to": 1, "duration": 2}, {"to": 0, "duration": 4}])
    >>> list(phases.curves({"lr": (0.1,)})["lr"][0].values(8))
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    lr: PhaseList | None = None
    """Phases of the learning rate."""
    momentum: PhaseList | None = None
    """Phases of momentum (betas[0] where an optimizer has betas)."""
    weight_decay: PhaseList | None = None
    """Phases of the weight decay."""
    relative: bool = False
    """Whether "from" and "to" are multipliers of each group's own value instead of values."""

    def _convert_fields(self) -> Iterator[Fault]:
        yield from super()._convert_fields()
        if not self.drives:
            yield Fault(None, "`lr`, `momentum` or `weight_decay` must have phases, but none has.")

    @property
    def drives(self) -> tuple[str, ...]:
        names = ("lr", "momentum", "weight_decay")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def span(self) -> int:
        totals = [sum(p["duration"] for p in getattr(self, name)) for name in self.drives]
        return int(max(totals)) + 1

    @property
    def unresolved(self) -> tuple[str, ...]:
        return tuple(
            name
            for name in self.drives
            if any(is_unresolved(phase["duration"]) for phase in getattr(self, name))
        )

    def _durations(self, horizon: Horizon) -> Iterator[tuple[str, Callable[[], Any]]]:
        for name in self.drives:
            yield name, partial(_phases_in_steps, getattr(self, name), horizon)

    def faults(self) -> Iterator[Fault]:
        for name in self.drives:
            before = None  # the group's own value, which is not known here
            for index, phase in enumerate(getattr(self, name)):
                begin = phase.get("from", before)
                before = phase.get("to", begin)
                ends = [end for end in (begin, before) if end is not None]
                yield from self._phase_faults(f"{name}[{index}]", name, phase, ends)

    def _phase_faults(
        self, where: str, name: str, phase: Mapping[str, Any], ends: Sequence[float]
    ) -> Iterator[Fault]:
        if phase["duration"] <= 0:
            yield Fault(name, f"`{where}.duration` must be at least 1 update, but is 0 instead.")
        if name == "momentum" and not self.relative and any(end >= 1 for end in ends):
            yield Fault(name, f"`{where}` must stay below 1, but goes to {max(ends):g} instead.")
        if phase.get("shape") == "exponential" and 0 in ends:
            yield Fault(
                name, f"`{where}` is exponential and must not touch 0; choose a small value."
            )

    def curves(self, base: Base) -> Curves:
        for name in self.drives:
            if not self.relative and any("to" in phase for phase in getattr(self, name)):
                self._refuse_to_flatten(name, base[name])
        return {
            name: tuple(self._joined(name, getattr(self, name), own) for own in base[name])
            for name in self.drives
        }

    def _refuse_to_flatten(self, name: str, own: tuple[float, ...]) -> None:
        if len(set(own)) > 1:
            groups = ", ".join(f"group {index}: {value:g}" for index, value in enumerate(own))
            raise ValueError(
                f"`{name}` must be relative where the param groups differ ({groups}), but goes to "
                'one value for all of them; write multiples of their own, and "relative": true.'
            )

    def _joined(self, name: str, phases: Sequence[Mapping[str, Any]], own: float) -> Curve:
        unit = own if self.relative else 1.0
        value, parts = own, []
        for phase in phases:
            begin = phase["from"] * unit if "from" in phase else value
            value = phase["to"] * unit if "to" in phase else begin
            if phase.get("shape") == "exponential" and 0 in (begin, value):
                raise ValueError(
                    f"a phase of `{name}` is exponential and must not touch 0, but goes from "
                    f"{begin:g} to {value:g} instead: a group's own value is {own:g}."
                )
            if name == "momentum" and max(begin, value) >= 1:
                raise ValueError(
                    f"a phase of `momentum` must stay below 1, but goes from {begin:g} to "
                    f"{value:g} instead: a group's own value is {own:g}."
                )
            parts.append(SHAPES[phase.get("shape", "linear")](begin, value, phase["duration"]))
        boundaries = itertools.accumulate(phase["duration"] for phase in phases[:-1])
        names = [
            "constant" if phase.get("to") is None else phase.get("shape", "linear")
            for phase in phases
        ]
        return join(parts, boundaries=boundaries, names=names)


def _phases_in_steps(phases: Sequence[Mapping[str, Any]], horizon: Horizon) -> tuple[Any, ...]:
    resolved = []
    for phase in phases:
        scaled = horizon.scale_warmup or not phase.get("warmup", False)
        resolved.append({**phase, "duration": steps_of(phase["duration"], horizon, scaled=scaled)})
    return tuple(resolved)


@schedule_class
class WarmupStableDecay(
    LearningRateSchedule,
    example={"warmup_steps": 10, "total_steps": "1dur", "decay_steps": "0.3dur"},
):
    """Warmup-stable-decay (WSD): a straight warmup, the learning rate itself, a decay at the end.

    The decay takes the last ``decay_steps`` of ``total_steps``, in the shape "linear", "cosine",
    "1-sqrt" or "half-life", down to a share of the learning rate, which is held.

    >>> wsd = WarmupStableDecay(warmup_steps=2, total_steps=8, decay_steps=4)
    >>> list(wsd.curves({"lr": (1.0,)})["lr"][0].values(9))
    [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    Source: Hu et al., MiniCPM, https://arxiv.org/abs/2404.06395.
    """

    warmup_steps: WarmupStepsOrZero = 0
    """Length of the warmup."""
    total_steps: Steps
    """Length of the run, warmup and decay included."""
    decay_steps: Steps
    """Length of the decay."""
    decay_type: Literal["linear", "cosine", "1-sqrt", "half-life"] = "linear"
    """Shape of the decay."""
    min_lr_ratio: Ratio = 0.0
    """Share of the learning rate at the end."""

    def faults(self) -> Iterator[Fault]:
        needed, total = self._warmup + self._decay, as_number(self.total_steps)
        if needed > total:
            yield Fault(
                "decay_steps",
                f"`warmup_steps` and `decay_steps` must fit into `total_steps` "
                f"({total:g}), but come to {needed:g} instead; shorten one of them.",
            )

    @property
    def _warmup(self) -> float:
        return as_number(self.warmup_steps)

    @property
    def _decay(self) -> float:
        return as_number(self.decay_steps)

    def curve(self, lr: float) -> Curve:
        decay_begins = as_number(self.total_steps) - self._decay
        return join(
            [
                linear(0.0, lr, self._warmup),
                constant(lr),
                SHAPES[self.decay_type](lr, self.min_lr_ratio * lr, self._decay),
            ],
            boundaries=[self._warmup, decay_begins],
            names=("warmup", "stable", "decay"),
        )


@schedule_class
class InverseSquareRoot(LearningRateSchedule, example={"warmup_steps": 10}):
    """A straight warmup, then the inverse square root of time, for ever.

    ::

        lr(k) = lr * k / warmup_steps                                k < warmup_steps
                lr / sqrt(1 + (k - warmup_steps) / timescale)        after

    Source: Zhai et al., Scaling vision transformers, https://arxiv.org/abs/2106.04560; Vaswani et
    al., https://arxiv.org/abs/1706.03762, where the time scale is the warmup.
    """

    warmup_steps: WarmupStepsOrZero = 0
    """Length of the warmup."""
    timescale: Steps | None = None
    """Updates after the warmup in which 1 is added under the root; null means `warmup_steps`."""

    def faults(self) -> Iterator[Fault]:
        if not (self.timescale or self.warmup_steps):
            yield Fault("timescale", "`timescale` must be given where there is no warmup.")

    def curve(self, lr: float) -> Curve:
        steps = as_number(self.warmup_steps)
        decay = inverse_sqrt(lr, as_number(self.timescale or steps))
        warmup = linear(0.0, lr, steps)
        return join([warmup, decay], boundaries=[steps], names=("warmup", "decay"))

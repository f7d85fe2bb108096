"""Schedules made of schedules: one after the other, multiplied, or side by side."""

from __future__ import annotations

import dataclasses
import functools
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from schedules.core.combinators import join, pointwise
from schedules.core.curves import Curve, constant
from schedules.core.durations import Horizon
from schedules.core.fields import Items, Milestones
from schedules.core.registry import from_config
from schedules.core.schedule import Base, Curves, Fault, Schedule

__all__ = ["ChainedScheduler", "Combined", "SequentialLR"]

schedule = dataclasses.dataclass(frozen=True, kw_only=True)

_BLOCK = {
    "type": "object",
    "properties": {"type": {"type": "string"}, "params": {"type": "object"}},
    "required": ["type"],
    "additionalProperties": False,
}
Blocks = Annotated[tuple[Any, ...], Items(_BLOCK)]


@schedule
class _Composite(Schedule[int]):
    schedulers: Blocks
    """The parts, each a block ``{"type": …, "params": {…}}`` of its own."""

    @functools.cached_property
    def parts(self) -> tuple[Schedule[Any], ...]:
        """The schedules of the blocks."""
        return tuple(from_config(block) for block in self.schedulers)

    def _convert_fields(self) -> Iterator[Fault]:
        wrong = list(super()._convert_fields())
        yield from wrong
        if any(fault.field == "schedulers" for fault in wrong):
            return
        for index, block in enumerate(self.schedulers):
            try:
                part = from_config(block)
            except ValueError as error:
                yield Fault("schedulers", f"`schedulers[{index}]`: {error}")
                continue
            if part.feedback is not None:
                message = (
                    f"`schedulers[{index}]` must follow from the count of updates alone, but "
                    f"{part.type_name} listens to {part.feedback}; let it be the schedule itself."
                )
                yield Fault("schedulers", message)

    @property
    def drives(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.drives))

    @property
    def span(self) -> int:
        return max(part.span for part in self.parts)

    @property
    def unresolved(self) -> tuple[str, ...]:
        nested = ("schedulers",) if any(part.unresolved for part in self.parts) else ()
        return super().unresolved + nested

    def _durations(self, horizon: Horizon) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield from super()._durations(horizon)
        yield "schedulers", functools.partial(self._resolved_blocks, horizon)

    def _resolved_blocks(self, horizon: Horizon) -> tuple[Any, ...]:
        blocks = []
        for index, part in enumerate(self.parts):
            try:
                params = part.resolve(horizon).params()
            except ValueError as error:
                raise ValueError(f"part {index}: {error}") from None
            blocks.append({"type": part.type_name, "params": params})
        return tuple(blocks)

    def curves(self, base: Base) -> Curves:
        return self.combined([part.curves(base) for part in self.parts], base)

    def curves_for(self, base: Base, horizon: Horizon | None = None) -> Curves:
        # Each part scales by itself: one whose parameters mean "for each step" is dilated.
        parts = [part.curves_for(base, horizon) for part in self.parts]
        return self.resolve(horizon).combined(parts, base)

    @abstractmethod
    def combined(self, parts: Sequence[Curves], base: Base) -> Curves:
        """Return what the parts come to together."""


@schedule
class SequentialLR(
    _Composite,
    example={
        "schedulers": [
            {"type": "LinearLR", "params": {"start_factor": 0.1, "total_iters": 20}},
            {"type": "CosineAnnealingLR", "params": {"T_max": 60}},
            {"type": "ConstantLR", "params": {"factor": 0.2, "total_iters": "1dur"}},
        ],
        "milestones": [20, 80],
    },
):
    """One schedule after the other, each on a clock of its own from its milestone on.

    What a part does not drive keeps the group's own value in it.

    Source: ``SequentialLR`` of torch/optim/lr_scheduler.py.
    """

    milestones: Milestones
    """Time at which each part but the first begins, in ascending order."""

    def faults(self) -> Iterator[Fault]:
        if list(self.milestones) != sorted(self.milestones):
            shown = list(self.milestones)
            yield Fault("milestones", f"`milestones` must ascend, but are {shown} instead.")
        if len(self.milestones) != len(self.schedulers) - 1:
            yield Fault(
                "milestones",
                f"`milestones` must be one fewer than the {len(self.schedulers)} `schedulers`, but "
                f"are {len(self.milestones)} instead.",
            )

    @property
    def span(self) -> int:
        return int(self.milestones[-1]) + self.parts[-1].span

    def combined(self, parts: Sequence[Curves], base: Base) -> Curves:
        return {
            name: tuple(
                join(
                    [part[name][group] if name in part else constant(own) for part in parts],
                    boundaries=self.milestones,
                    names=[part.type_name for part in self.parts],
                )
                for group, own in enumerate(base[name])
            )
            for name in self.drives
        }


@schedule
class ChainedScheduler(
    _Composite,
    example={
        "schedulers": [
            {"type": "LinearLR", "params": {"start_factor": 0.1, "total_iters": 20}},
            {"type": "ExponentialLR", "params": {"gamma": 0.98}},
        ]
    },
):
    """Several schedules multiplied: each gives a share of the group's own value.

    ::

        lr(k) = lr * product of (part's lr(k) / lr)

    Source: ``ChainedScheduler`` of torch/optim/lr_scheduler.py.
    """

    def combined(self, parts: Sequence[Curves], base: Base) -> Curves:
        return {
            name: tuple(
                _product([part[name][group] for part in parts if name in part], own)
                for group, own in enumerate(base[name])
            )
            for name in self.drives
        }


def _product(curves: Sequence[Curve], own: float) -> Curve:
    if own == 0:
        return constant(0.0)
    share_of = functools.partial(pointwise, lambda total, value: total * (value / own))
    return functools.reduce(share_of, curves)


@schedule
class Combined(
    _Composite,
    example={
        "schedulers": [
            {"type": "OneCycleLR", "params": {"max_lr": 0.1, "total_steps": "1dur"}},
            {
                "type": "Phases",
                "params": {"weight_decay": [{"from": 0.0, "to": 0.1, "duration": "1dur"}]},
            },
        ]
    },
):
    """Several schedules side by side: one drives the learning rate, another the weight decay.

    A schedule of the weight decay beside any schedule of the learning rate::

        {"type": "Combined", "params": {"schedulers": [
            {"type": "OneCycle", "params": {…}},
            {"type": "Phases", "params": {"weight_decay": [{"to": 0.1, "duration": "1dur"}]}}
        ]}}
    """

    def faults(self) -> Iterator[Fault]:
        seen: dict[str, int] = {}
        for index, part in enumerate(self.parts):
            for name in part.drives:
                if seen.setdefault(name, index) != index:
                    yield Fault(
                        "schedulers",
                        f"`schedulers` must drive each hyperparameter once, but {seen[name]} and "
                        f"{index} both drive {name}; ChainedScheduler multiplies two.",
                    )

    def combined(self, parts: Sequence[Curves], base: Base) -> Curves:
        del base  # each part has its share of it already
        return functools.reduce(operator.or_, (dict(part) for part in parts))

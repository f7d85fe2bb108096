"""Schedules that run other schedules in sequence or in parallel, or multiply their factors."""

from __future__ import annotations

import functools
import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from schedules.core.combinators import join, pointwise
from schedules.core.controller import Base, Curves
from schedules.core.curves import Curve, constant
from schedules.core.durations import Horizon
from schedules.core.fields import Items, Milestones, as_number
from schedules.core.imports import ImportForbiddenError
from schedules.core.parts import ScheduleOfParts
from schedules.core.per_group import build_curve_per_group
from schedules.core.registry import from_config
from schedules.core.schedule import (
    Joint,
    ParameterProblem,
    Schedule,
    format_arguments,
    schedule_class,
)

__all__ = ["ChainedScheduler", "Combined", "SequentialLR"]


_BLOCK = {
    "type": "object",
    "properties": {"type": {"type": "string"}, "params": {"type": "object"}},
    "required": ["type"],
    "additionalProperties": False,
}
Blocks = Annotated[Sequence[Mapping[str, Any]], Items(_BLOCK)]
BuildCurves = Callable[[Base], Curves]
_MAX_SCHEDULES = 100


@schedule_class
class _Composite(ScheduleOfParts):
    schedulers: Blocks
    """Schedules to combine, each a block ``{"type": …, "params": {…}}`` or, in Python, a
    `Schedule`."""

    @functools.cached_property
    def parts(self) -> tuple[Schedule[Any], ...]:
        """The schedules built from the blocks in `schedulers`."""
        return tuple(from_config(block) for block in self.schedulers)

    def _convert_fields(self) -> Iterator[ParameterProblem]:
        if isinstance(self.schedulers, list | tuple):
            blocks = tuple(map(_to_block, self.schedulers))
            object.__setattr__(self, "schedulers", blocks)
        problems = list(super()._convert_fields())
        yield from problems
        if any(problem.field == "schedulers" for problem in problems):
            return
        count = _count_blocks(self.schedulers)
        if count > _MAX_SCHEDULES:
            message = (
                f"`schedulers` must contain at most {_MAX_SCHEDULES} schedules, including nested "
                f"ones, got {count}. Remove some schedules."
            )
            yield ParameterProblem("schedulers", message)
            return
        parts, is_valid, forbidden = [], True, None
        for index, block in enumerate(self.schedulers):
            try:
                part = from_config(block)
                parts.append(part)
            except ImportForbiddenError as error:
                forbidden = error
                continue
            except ValueError as error:
                is_valid = False
                yield ParameterProblem("schedulers", f"`schedulers[{index}]`: {error}")
                continue
            if part.feedback is not None:
                message = (
                    f"`schedulers[{index}]` must not depend on the {part.feedback}, got "
                    f"{part.type_name}. Use {part.type_name} as the only schedule"
                    f"{_suggest_warmup(part)}."
                )
                yield ParameterProblem("schedulers", message)
                is_valid = False
        if forbidden is not None and is_valid:
            raise forbidden
        # Nested schedules would otherwise be built twice at each level.
        self.__dict__["parts"] = tuple(parts)

    def __repr__(self) -> str:
        others = {name: value for name, value in self.params().items() if name != "schedulers"}
        arguments = {"schedulers": list(self.parts), **others}
        return f"{self.type_name}({format_arguments(arguments)})"

    @property
    def num_groups(self) -> int | None:
        return next((part.num_groups for part in self.parts if part.num_groups), None)

    def joints(self) -> Iterator[Joint]:
        for part in self.parts:
            for joint in part.joints():
                yield joint._replace(field="schedulers")

    def _durations(self, horizon: Horizon) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield from super()._durations(horizon)
        yield "schedulers", functools.partial(self._resolve_blocks, horizon)

    def _resolve_blocks(self, horizon: Horizon) -> tuple[Any, ...]:
        blocks = []
        for index, part in enumerate(self.parts):
            try:
                params = part.resolve(horizon).params()
            except ValueError as error:
                raise ValueError(f"schedule {index}: {error}") from None
            blocks.append({"type": part.type_name, "params": params})
        return tuple(blocks)

    def curves(self, base: Base) -> Curves:
        return self.combine([part.curves for part in self.parts], base)

    def build_curves(self, base: Base, horizon: Horizon | None = None) -> Curves:
        # Each part scales its own curves, because the curves of a part with a rate per step
        # (`has_rate_per_step`) must be stretched as a whole.
        parts = [functools.partial(part.build_curves, horizon=horizon) for part in self.parts]
        return self.resolve(horizon).combine(parts, base)

    @abstractmethod
    def combine(self, parts: Sequence[BuildCurves], base: Base) -> Curves:
        """Return the combined curve of each hyperparameter in each param group.

        Args:
            parts: for each schedule, a function that builds its curves from initial
                hyperparameters.
            base: initial hyperparameters of the optimizer.
        """


@schedule_class
class SequentialLR(
    _Composite,
    example={
        "schedulers": [
            {"type": "LinearLR", "params": {"start_factor": 0.1, "total_iters": 20}},
            {"type": "ConstantLR", "params": {"factor": 1.0, "total_iters": 50}},
            {"type": "PolynomialLR", "params": {"total_iters": "0.3dur"}},
        ],
        "milestones": [20, 70],
    },
):
    """Run several schedules one after another. At each milestone, the next schedule starts.

    Each schedule counts its steps from its own start. By default, it starts from the initial values
    of the param group. With ``from_previous``, it starts from the values that the previous
    schedule has reached. While a schedule is active, hyperparameters that it does not set keep
    these starting values.

    >>> blocks = [
    ...     {"type": "PolynomialLR", "params": {"total_iters": 4}},
    ...     {"type": "ExponentialLR", "params": {"gamma": 0.5}},
    ... ]
    >>> steps = range(5)
    >>> SequentialLR(schedulers=blocks, milestones=[2])(steps, lr=1.0).tolist()
    [1.0, 0.75, 1.0, 0.5, 0.25]
    >>> SequentialLR(schedulers=blocks, milestones=[2], from_previous=True)(steps, lr=1.0).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.125]

    Source: ``SequentialLR`` in torch/optim/lr_scheduler.py.
    """

    milestones: Milestones
    """Steps, in ascending order, at which the second and later schedules start."""
    from_previous: bool = False
    """Whether each schedule after the first starts from the hyperparameter values that the previous
    schedule reached at the milestone. If false, as in PyTorch, each schedule starts from the
    initial values of the param group. Parameters that set a learning rate directly, such as
    `cycle_max_lr`, are not affected."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        if list(self.milestones) != sorted(self.milestones):
            yield ParameterProblem(
                "milestones",
                "`milestones` must be in ascending order, got "
                f"{list(self.milestones)} (in steps). Sort the list.",
            )
        if len(self.milestones) != len(self.schedulers) - 1:
            yield ParameterProblem(
                "milestones",
                f"`milestones` must have {len(self.schedulers) - 1} items, one fewer than "
                f"`schedulers`, got {len(self.milestones)}. List the step at which each "
                "schedule after the first starts.",
            )

    def joints(self) -> Iterator[Joint]:
        fix = 'Set "from_previous": true to continue from the last value of each schedule.'
        if self.from_previous:
            fix = (
                "Change the parameters of the two schedules so that the values match at this step."
            )
        starts = [0.0, *map(as_number, self.milestones)]
        for start, end, part in zip(starts, [*starts[1:], math.inf], self.parts, strict=True):
            for joint in part.joints():
                if start + joint.step < end:
                    yield joint._replace(step=start + joint.step, field="schedulers")
        for name in self.hyperparameters:
            for start in starts[1:]:
                yield Joint(name, start, "milestones", fix)

    @property
    def length(self) -> int | None:
        last = self.parts[-1].length
        return None if last is None else math.ceil(as_number(self.milestones[-1])) + last

    @property
    def span(self) -> int:
        return int(self.milestones[-1]) + self.parts[-1].span

    def combine(self, parts: Sequence[BuildCurves], base: Base) -> Curves:
        names = [part.type_name for part in self.parts]
        boundaries = [as_number(each) for each in self.milestones]

        def join_parts(*curves: Curve) -> Curve:
            return join(curves, boundaries, names)

        columns: list[Curves] = []
        for index, build in enumerate(parts):
            if index > 0 and self.from_previous:
                steps = boundaries[index - 1] - (boundaries[index - 2] if index > 1 else 0)
                reached = functools.partial(_evaluate, step=steps)
                base = {name: tuple(map(reached, columns[-1][name])) for name in base}
            own = {name: build_curve_per_group(constant, base[name]) for name in base}
            columns.append({**own, **build(base)})
        return {
            name: build_curve_per_group(join_parts, *(column[name] for column in columns))
            for name in self.hyperparameters
        }


@schedule_class
class ChainedScheduler(
    _Composite,
    example={
        "schedulers": [
            {"type": "LinearLR", "params": {"start_factor": 0.1, "total_iters": 20}},
            {"type": "ExponentialLR", "params": {"gamma": 0.98}},
        ]
    },
):
    """Apply several schedules at the same time by multiplying their factors.

    The factor of schedule i at step k is its learning rate lr_i(k) divided by the initial learning
    rate lr::

        lr(k) = lr * product over i of (lr_i(k) / lr)

    Momentum and weight decay are combined in the same way.

    Source: ``ChainedScheduler`` in torch/optim/lr_scheduler.py.
    """

    def combine(self, parts: Sequence[BuildCurves], base: Base) -> Curves:
        curves = [build(base) for build in parts]
        return {
            name: build_curve_per_group(
                _multiply, base[name], *(part[name] for part in curves if name in part)
            )
            for name in self.hyperparameters
        }


def _suggest_warmup(part: Schedule[Any]) -> str:
    """Return a hint to set ``warmup_steps``; "" if the schedule does not have this parameter."""
    return " and set its `warmup_steps` for a warmup" if hasattr(part, "warmup_steps") else ""


def _to_block(schedule: Any) -> Any:
    """Return the config block of a `Schedule`, or any other value unchanged."""
    if isinstance(schedule, Schedule):
        return {"type": schedule.type_name, "params": schedule.params()}
    return schedule


def _count_blocks(blocks: Any) -> int:
    """Return the number of schedules in a list of blocks, including nested schedules.

    Return 0 for a value that is not a list, because another check reports it.
    """
    if not isinstance(blocks, list | tuple):
        return 0
    params = [block.get("params") for block in blocks if isinstance(block, Mapping)]
    nested = [each.get("schedulers") for each in params if isinstance(each, Mapping)]
    return len(blocks) + sum(map(_count_blocks, nested))


def _evaluate(curve: Curve, step: float) -> float:
    """Return the value of ``curve`` at an integer or fractional ``step``."""
    value: float = curve.piece(step).formula(step)
    return value


def _multiply(own: float, *curves: Curve) -> Curve:
    if own == 0:
        return constant(0.0)
    multiply = functools.partial(pointwise, lambda total, value: total * (value / own))
    return functools.reduce(multiply, curves)


@schedule_class
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
    """Run several schedules in parallel, each for different hyperparameters.

    For example, combine a learning rate schedule with a weight decay schedule::

        {"type": "Combined", "params": {"schedulers": [
            {"type": "OneCycle", "params": {…}},
            {"type": "Phases", "params": {
                "weight_decay": [{"to": 0.1, "duration": "1dur"}]
            }}
        ]}}
    """

    def find_problems(self) -> Iterator[ParameterProblem]:
        seen: dict[str, int] = {}
        for index, part in enumerate(self.parts):
            for name in part.hyperparameters:
                if seen.setdefault(name, index) != index:
                    yield ParameterProblem(
                        "schedulers",
                        f"`schedulers` must set each hyperparameter only once, but schedules "
                        f"{seen[name]} and {index} both set {name}. Use ChainedScheduler to "
                        "multiply their factors.",
                    )

    def combine(self, parts: Sequence[BuildCurves], base: Base) -> Curves:
        return functools.reduce(operator.or_, (dict(build(base)) for build in parts))

"""`Schedule`: the ``params`` of one ``scheduler.type``, validated when it is constructed.

Bound to an optimizer's base values it becomes a `schedules.core.controller.Controller`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast

from schedules.core.combinators import dilate
from schedules.core.controller import Base, Controller, Curves, OpenLoop, Values
from schedules.core.curves import Curve
from schedules.core.durations import FractionalSteps, Horizon, is_unresolved, steps_of
from schedules.core.fields import Duration, PerGroup, fields_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Base",
    "Curves",
    "Fault",
    "LearningRateSchedule",
    "Schedule",
    "ScheduleError",
    "Values",
    "broadcast",
    "curve_per_group",
    "exceeds",
    "spread",
]

S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a schedule's parameters, and the parameter to change."""

    field: str | None
    message: str


class ScheduleError(ValueError):
    """Parameters that make no schedule; ``faults`` holds every one that was found.

    ValueError
    └── ScheduleError
    """

    def __init__(self, type_name: str, faults: list[Fault]) -> None:
        super().__init__(f"{type_name}: " + " ".join(fault.message for fault in faults))
        self.faults = tuple(faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(ABC, Generic[S]):
    """The parameters of one ``scheduler.type``: names, types, ranges, defaults and meanings.

    A subclass is a frozen, keyword-only dataclass with a string under each field. It says in
    `faults` what the fields must be to one another, and in `curves` what it drives.

    Raises:
        ScheduleError: a parameter is of the wrong type, out of its range, or at odds with another.
    """

    type_name: ClassVar[str]
    """What a config calls this schedule; the class's name, unless `type_name` says another."""

    clock_is_step: ClassVar[bool] = False
    """Whether a parameter means "for each step", so that scaling dilates the curves as a whole."""

    feedback: ClassVar[Literal["loss", "metric"] | None] = None
    """The input that each step must give it; None if its values follow from the step alone."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Parameters that show the shape in a run of 100 updates, 10 an epoch."""

    def __init_subclass__(
        cls,
        type_name: str | None = None,
        example: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        cls.type_name = type_name or cls.__name__
        cls.example = example or {}

    def __post_init__(self) -> None:
        faults = list(self._convert_fields())
        if not faults and not self.unresolved:
            faults = list(self.faults())
        if faults:
            raise ScheduleError(self.type_name, faults)

    def _convert_fields(self) -> Iterator[Fault]:
        for name, field in fields_of(type(self)).items():
            try:
                object.__setattr__(self, name, field.convert(getattr(self, name)))
            except ValueError as error:  # noqa: PERF203  # each field's own error is wanted
                yield Fault(name, str(error))

    @property
    def unresolved(self) -> tuple[str, ...]:
        """The fields that hold time strings, which a `Horizon` has to make counts of updates."""
        return tuple(
            name
            for name, field in fields_of(type(self)).items()
            if field.duration is not None and any(map(is_unresolved, _listed(getattr(self, name))))
        )

    def resolve(self, horizon: Horizon | None = None) -> Self:
        """Return the same schedule with every duration in updates, and scaled.

        Args:
            horizon: the run; needed where there are time strings.

        Raises:
            ScheduleError: a duration cannot be resolved, or comes to no update, or the durations
                are at odds with one another.

        >>> from schedules import Horizon, WarmupDecayLR
        >>> decay = WarmupDecayLR(total_num_steps="1dur", warmup_num_steps="2ep")
        >>> decay.resolve(Horizon(total_steps=100, steps_per_epoch=10)).warmup_num_steps
        20
        """
        horizon = horizon or Horizon()
        if not self.unresolved and horizon.scale_ratio == 1.0:
            return self
        changes: dict[str, Any] = {}
        faults = []
        for name, in_steps in self._durations(horizon):
            try:
                changes[name] = in_steps()
            except ValueError as error:  # noqa: PERF203  # each duration's own error is wanted
                faults.append(Fault(name, f"`{name}`: {error}"))
        if faults:
            raise ScheduleError(self.type_name, faults)
        return dataclasses.replace(self, **changes)

    def _durations(self, horizon: Horizon) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield each field that is a duration, with what returns it in updates."""
        for name, field in fields_of(type(self)).items():
            value = getattr(self, name)
            if field.duration is not None and value is not None:
                yield name, functools.partial(self._in_steps, value, field.duration, horizon)

    def _in_steps(self, value: Any, duration: Duration, horizon: Horizon) -> Any:
        scaled = not duration.warmup or horizon.scale_warmup or getattr(self, "scale_warmup", False)
        steps = tuple(steps_of(each, horizon, scaled=scaled) for each in _listed(value))
        if self.clock_is_step and horizon.scale_ratio != 1:
            # The whole is dilated afterwards, which brings each duration to what it is to be.
            steps = tuple(FractionalSteps(each / horizon.scale_ratio) for each in steps)
        return steps if isinstance(value, tuple) else steps[0]

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong between fields that are each right by themselves, and resolved."""
        yield from ()

    def warnings(self) -> Iterator[str]:
        """Yield warnings about a valid, resolved schedule that will hardly do what it is for."""
        yield from ()

    @property
    def drives(self) -> tuple[str, ...]:
        """The hyperparameters that this schedule writes, "lr" first."""
        return ("lr",)

    @property
    def span(self) -> int:
        """How many updates it takes to see the whole shape, once resolved; a fair part of it."""
        steps = [
            each
            for name, field in fields_of(type(self)).items()
            if field.duration is not None
            for each in _listed(getattr(self, name))
            if each is not None
        ]
        return 2 * int(max(steps, default=50))

    @abstractmethod
    def curves(self, base: Base) -> Curves:
        """Return the curve of each hyperparameter and group.

        Raises:
            ValueError: the base values do not fit, as when one number would flatten groups that
                were built with different learning rates.
        """

    def curves_for(self, base: Base, horizon: Horizon | None = None) -> Curves:
        """Return the curves to preview: resolved and scaled; with feedback, on a synthetic loss.

        Args:
            base: values that the optimizer was built with.
            horizon: length of the run, for time strings and scaling.

        Raises:
            ValueError: a duration cannot be resolved, or the base values do not fit.
        """
        curves = self.resolve(horizon).curves(base)
        if self.clock_is_step and horizon is not None:
            curves = {
                name: tuple(dilate(curve, horizon.scale_ratio) for curve in group)
                for name, group in curves.items()
            }
        return curves

    def bind(self, base: Base, horizon: Horizon | None = None) -> Controller[S]:
        """Return the controller that runs this schedule from these base values.

        Args:
            base: values that the optimizer was built with.
            horizon: length of the run, for time strings and scaling.

        Raises:
            ValueError: a duration cannot be resolved, or the base values do not fit.
        """
        return cast("Controller[S]", OpenLoop(self.curves_for(base, horizon)))

    def per_group(self, groups: int) -> tuple[Self, ...]:
        """Return the schedule of each param group: a field's list has one number for each.

        Raises:
            ValueError: a list is not as long as there are groups.
        """
        lists = {
            name: broadcast(name, value, (0.0,) * groups)
            for name, field in fields_of(type(self)).items()
            if field.per_group and isinstance(value := getattr(self, name), tuple)
        }
        if not lists:
            return (self,) * groups
        rows = (dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))
        return tuple(dataclasses.replace(self, **row) for row in rows)

    def params(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, or have none, as JSON carries them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, field in fields_of(type(self)).items()
            if (value := getattr(self, name)) != field.default or field.required
        }


class LearningRateSchedule(Schedule[int]):
    """A schedule of the learning rate alone that gives every group a curve made from its own."""

    def curves(self, base: Base) -> Curves:
        """Return each group's curve."""
        own = base["lr"]
        make = type(self).curve
        return {"lr": curve_per_group(make, self.per_group(len(own)), own)}

    @abstractmethod
    def curve(self, lr: float) -> Curve:
        """Return the curve of a group that was built with this learning rate."""


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def curve_per_group(make: Callable[..., Curve], *columns: tuple[Any, ...]) -> tuple[Curve, ...]:
    """Return ``make(*row)`` for each group's row of values; groups alike share one curve."""
    make_once = functools.cache(make)
    return tuple(make_once(*row) for row in zip(*columns, strict=True))


def exceeds(low: PerGroup, high: PerGroup) -> bool:
    """Return whether a field that must be at most another is more than it, in any group."""
    if isinstance(low, tuple) and isinstance(high, tuple):
        return any(map(operator.gt, low, high))
    return bool(max(_listed(low)) > min(_listed(high)))


def broadcast(name: str, value: PerGroup, base: tuple[float, ...]) -> tuple[float, ...]:
    """Return a field's value for each group: a number for all of them, a list one for each.

    Raises:
        ValueError: the list is not as long as there are groups.
    """
    if not isinstance(value, tuple):
        return (value,) * len(base)
    if len(value) != len(base):
        raise ValueError(
            f"`{name}` must hold one number for each of the {len(base)} param groups, "
            f"but holds {len(value)} instead."
        )
    return value


def spread(name: str, value: PerGroup, base: tuple[float, ...]) -> tuple[float, ...]:
    """Return a field's value for each group, refusing one number that would make them all alike.

    Raises:
        ValueError: the groups were built with different values and ``value`` is a single number,
            or the list is not as long as there are groups.
    """
    if not isinstance(value, tuple) and len(set(base)) > 1:
        groups = ", ".join(f"group {index}: {own:g}" for index, own in enumerate(base))
        raise ValueError(
            f"`{name}` must be a list of {len(base)} numbers, one a param group, but is {value:g} "
            f"instead, which would give all groups the same value ({groups})."
        )
    return broadcast(name, value, base)

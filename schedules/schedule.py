"""The nouns: `Schedule`, what it is given (`Base`), what it becomes (`Controller`).

A schedule is data: the ``params`` of one ``scheduler.type``, proved when it is constructed. Bound
to an optimizer's base values it becomes a controller, whose whole memory is an explicit state.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from schedules.curves import Curve
from schedules.fields import PerGroup, fields_of

__all__ = [
    "Base",
    "Controller",
    "Curves",
    "Fault",
    "OpenLoop",
    "Schedule",
    "ScheduleError",
    "Values",
    "broadcast",
    "curve_per_group",
    "spread",
]

S = TypeVar("S")

Base = Mapping[str, tuple[float, ...]]
"""A hyperparameter ("lr", "momentum", "weight_decay") to its value in each group as built."""

Values = Mapping[str, tuple[float, ...]]
"""A hyperparameter to the value that each group is to use."""

Curves = Mapping[str, tuple[Curve, ...]]
"""A hyperparameter to the curve that each group follows; groups may share one curve."""


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


class Controller(Protocol[S]):
    """A schedule bound to base values: a rule, with all that it remembers in a state of its own.

    The state is made of plain numbers that JSON can carry, and no method changes it in place.
    """

    def init(self) -> S:
        """Return the state before the first update."""
        ...

    def update(self, state: S, loss: float | None) -> S:
        """Return the state after an optimizer update that was applied."""
        ...

    def values(self, state: S) -> Values:
        """Return what the next optimizer update uses."""
        ...


@dataclasses.dataclass(frozen=True)
class OpenLoop:
    """The controller of every schedule without feedback; its state is the count of updates."""

    curves: Curves

    def init(self) -> int:
        """Return 0: no update was applied yet."""
        return 0

    def update(self, state: int, loss: float | None = None) -> int:
        """Return the count one higher; the loss is of no use here."""
        del loss
        return state + 1

    def values(self, state: int) -> Values:
        """Return each curve's value at the count of updates."""
        return {name: tuple(curve(state) for curve in group) for name, group in self.curves.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(ABC, Generic[S]):
    """The parameters of one ``scheduler.type``: names, types, ranges, defaults and meanings.

    A subclass is a frozen, keyword-only dataclass with a string under each field. It says in
    `faults` what the fields must be to one another, and in `curves` what it drives.

    Raises:
        ScheduleError: a parameter is of the wrong type, out of its range, or at odds with another.
    """

    def __post_init__(self) -> None:
        faults = list(self._convert_fields()) or list(self.faults())
        if faults:
            raise ScheduleError(type(self).__name__, faults)

    def _convert_fields(self) -> Iterator[Fault]:
        for name, field in fields_of(type(self)).items():
            try:
                object.__setattr__(self, name, field.convert(getattr(self, name)))
            except ValueError as error:  # noqa: PERF203  # each field's own error is wanted
                yield Fault(name, str(error))

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong between fields that are each right by themselves."""
        yield from ()

    @property
    @abstractmethod
    def drives(self) -> tuple[str, ...]:
        """The hyperparameters that this schedule writes, "lr" first."""

    @property
    @abstractmethod
    def span(self) -> int:
        """How many updates it takes to see the whole shape; endless schedules say a fair part."""

    @abstractmethod
    def curves(self, base: Base) -> Curves:
        """Return the curve of each hyperparameter and group.

        Raises:
            ValueError: the base values do not fit, as when one number would flatten groups that
                were built with different learning rates.
        """

    def bind(self, base: Base) -> OpenLoop:
        """Return the controller that runs this schedule from these base values."""
        return OpenLoop(self.curves(base))

    def params(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, or have none, as JSON carries them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, field in fields_of(type(self)).items()
            if (value := getattr(self, name)) != field.default or field.required
        }


def curve_per_group(make: Callable[..., Curve], *columns: tuple[float, ...]) -> tuple[Curve, ...]:
    """Return ``make(*row)`` for each group's row of values; groups alike share one curve."""
    make_once = functools.cache(make)
    return tuple(make_once(*row) for row in zip(*columns, strict=True))


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

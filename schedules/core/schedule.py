"""Define `Schedule`, the base class of all schedules, and the error for invalid parameters.

`Schedule.bind` returns a `schedules.core.controller.Controller` that computes the scheduled
hyperparameters for an optimizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    TypeVar,
    cast,
    overload,
)

from schedules.core.combinators import dilate
from schedules.core.controller import DEFAULT_BASE, Base, Controller, Curves, OpenLoop
from schedules.core.curves import Curve
from schedules.core.durations import FractionalSteps, Horizon, convert_to_steps, is_time_string
from schedules.core.fields import Duration, as_tuple, read_fields
from schedules.core.html import draw_html
from schedules.core.per_group import broadcast, build_curve_per_group

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import dataclass_transform

__all__ = [
    "Joint",
    "LearningRateSchedule",
    "ParameterProblem",
    "Schedule",
    "ScheduleError",
    "schedule_class",
]

_LENGTH_FIELDS = (
    "total_num_steps",
    "total_steps",
    "max_steps",
    "max_update",
    "t_max",
    "T_max",
)
"""Parameters that set the length of a schedule in DeepSpeed, PyTorch and other libraries."""

_SHOWN_STEPS = 1000
"""Run length, in steps, that notebook plots assume for durations such as "0.1dur"."""

C = TypeVar("C")
S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class ParameterProblem:
    """A problem with a schedule's parameters.

    ``field`` is the name of the parameter to change; None if no single parameter is the cause.
    """

    field: str | None
    message: str


class Joint(NamedTuple):
    """Step at which one phase of a schedule ends and the next phase starts."""

    hyperparameter: str
    step: float
    field: str
    """Name of the parameter that defines the phases."""
    fix: str
    """Advice on how to remove a jump in the hyperparameter at this step."""


class ScheduleError(ValueError):
    """Raised when parameters of a schedule are invalid. ``problems`` lists every problem.

    ValueError
    └── ScheduleError
    """

    def __init__(self, type_name: str, problems: Sequence[ParameterProblem]) -> None:
        self.type_name = type_name
        self.problems = tuple(problems)
        super().__init__(type_name, self.problems)  # unpickling passes these to `__init__`

    def __str__(self) -> str:
        return f"{self.type_name}: " + " ".join(problem.message for problem in self.problems)


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, kw_only_default=True)
    def schedule_class(cls: type[C]) -> type[C]:
        """Turn a schedule class into a frozen, keyword-only dataclass."""
        ...

else:
    # Type checkers use the definition above. With this alias, they would reject keyword arguments
    # in the constructor of a schedule.
    schedule_class = dataclasses.dataclass(frozen=True, kw_only=True, repr=False)


def format_arguments(arguments: Mapping[str, Any]) -> str:
    """Format keyword arguments for a repr.

    >>> format_arguments({"factor": 0.5, "total_iters": "1dur"})
    "factor=0.5, total_iters='1dur'"
    """
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


@schedule_class
class Schedule(ABC, Generic[S]):
    """Base class of all schedules. The fields of a schedule are its ``params`` in a config.

    A subclass must be a frozen, keyword-only dataclass with a docstring below each field. Override
    `curves` to compute the hyperparameters, and `find_problems` to report conflicts between fields.

    Raises:
        ScheduleError: a parameter has an invalid type, is out of range, or conflicts with another.
    """

    type_name: ClassVar[str]
    """Name of the schedule in a config. Defaults to the class name. To change it, pass
    ``type_name=`` in the class statement."""

    has_rate_per_step: ClassVar[bool] = False
    """Whether any parameter is a rate per step. If so, `Horizon.scale_ratio` stretches the curves
    as a whole, because scaling only the durations would leave the rate unchanged."""

    group_keys: ClassVar[tuple[str, ...]] = ()
    """Parameters that a param group of the optimizer can override with a key of the same name."""

    feedback: ClassVar[Literal["loss", "metric"] | None] = None
    """Kind of feedback that the schedule depends on; None if it depends only on the step."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Parameters for the documentation's example run, which has 10 epochs of 10 steps each."""

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
        problems = list(self._convert_fields())
        if not problems and not self.unresolved_fields:
            problems = list(self.find_problems())
        if problems:
            raise ScheduleError(self.type_name, problems)

    def __repr__(self) -> str:
        return f"{self.type_name}({format_arguments(self.params())})"

    def _repr_html_(self) -> str:
        """Return HTML with the repr and small plots of the curves, for display in notebooks.

        The plots assume a run of 1,000 steps if a duration is a fraction of the run. There are no
        plots if the schedule depends on the loss or a metric, or has a duration in epochs, samples
        or tokens.
        """
        curves: Curves = {}
        steps = _SHOWN_STEPS
        if self.feedback is None:
            groups = self.num_groups or 1
            base = {name: values * groups for name, values in DEFAULT_BASE.items()}
            horizon = Horizon(total_steps=_SHOWN_STEPS) if self.unresolved_fields else None
            with contextlib.suppress(ValueError):
                steps = steps if horizon else max(1, self.resolve().span)
                curves = self.build_curves(base, horizon)
        return draw_html(repr(self), curves, steps)

    def _convert_fields(self) -> Iterator[ParameterProblem]:
        for name, field in read_fields(type(self)).items():
            try:
                object.__setattr__(self, name, field.convert(getattr(self, name)))
            except ValueError as error:  # one error per field
                yield ParameterProblem(name, str(error))
        lists = self.lists_per_group
        if len(set(map(len, lists.values()))) > 1:
            (first, *_), (last, *_) = lists, reversed(lists)
            lengths = ", ".join(f"`{name}` has {len(value)}" for name, value in lists.items())
            yield ParameterProblem(
                last,
                f"`{last}` and `{first}` must each have one number per param group, but {lengths}. "
                "Make the lists equally long.",
            )

    @property
    def unresolved_fields(self) -> tuple[str, ...]:
        """Names of the fields that contain time strings, such as "10ep"."""
        return tuple(
            name
            for name, field in read_fields(type(self)).items()
            if field.duration is not None
            and any(map(is_time_string, as_tuple(getattr(self, name))))
        )

    def resolve(self, horizon: Horizon | None = None) -> Self:
        """Return the schedule with all durations in steps, scaled by ``horizon.scale_ratio``.

        Args:
            horizon: length of the run, and the scale ratio. Required for time strings, except those
                in steps, such as "500ba".

        Raises:
            ScheduleError: a duration cannot be converted to steps, is out of range, or conflicts
                with another parameter.

        >>> from schedules import Horizon, WarmupDecayLR
        >>> decay = WarmupDecayLR(total_num_steps="1dur", warmup_num_steps="2ep")
        >>> decay.resolve(Horizon(total_steps=100, steps_per_epoch=10)).warmup_num_steps
        20
        """
        horizon = horizon or Horizon()
        if not self.unresolved_fields and horizon.scale_ratio == 1.0:
            return self
        changes: dict[str, Any] = {}
        problems = []
        for name, in_steps in self._durations(horizon):
            try:
                changes[name] = in_steps()
                self._check_minimum(name, changes[name])
            except ValueError as error:  # one error per duration
                problems.append(ParameterProblem(name, f"`{name}`: {error}"))
        if problems:
            raise ScheduleError(self.type_name, problems)
        return dataclasses.replace(self, **changes)

    def _check_minimum(self, name: str, steps: Any) -> None:
        """Raise an error if a time string converts to 0 steps but the minimum is 1 step."""
        least, given = read_fields(type(self))[name].minimum, as_tuple(getattr(self, name))
        for time, count in zip(given, as_tuple(steps), strict=True):
            if is_time_string(time) and count == 0 < least:
                raise ValueError(
                    f"{time!r} converts to 0 steps in this run, but the duration must be at least "
                    "1 step. Use a longer duration or a longer run."
                )

    def _durations(self, horizon: Horizon) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield the name of each duration and a function that returns its value in steps."""
        for name, field in read_fields(type(self)).items():
            value = getattr(self, name)
            if field.duration is not None and value is not None:
                yield name, functools.partial(self._in_steps, value, field.duration, horizon)

    def _in_steps(self, value: Any, duration: Duration, horizon: Horizon) -> Any:
        scaled = not duration.warmup or horizon.scale_warmup or getattr(self, "scale_warmup", False)
        steps = tuple(convert_to_steps(each, horizon, scaled=scaled) for each in as_tuple(value))
        if self.has_rate_per_step and horizon.scale_ratio != 1:
            # `build_curves` stretches the curves later, so the ratio must not be applied here.
            steps = tuple(FractionalSteps(each / horizon.scale_ratio) for each in steps)
        return steps if isinstance(value, tuple) else steps[0]

    def find_problems(self) -> Iterator[ParameterProblem]:
        """Yield a problem for each conflict between fields.

        The constructor calls this method after it has validated each field. If a duration is a
        time string, this method is called only after `resolve` has converted it to steps.
        """
        yield from ()

    def warnings(self) -> Iterator[str]:
        """Yield a warning for each parameter that is valid but unlikely to work well."""
        yield from ()

    def joints(self) -> Iterator[Joint]:
        """Yield the joint at the start of each phase except the first.

        Values can jump at a joint. Call `resolve` first if a duration is a time string.
        """
        yield from ()

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of the hyperparameters that the schedule sets, such as ``("lr", "momentum")``."""
        return ("lr",)

    @property
    def length(self) -> int | None:
        """Number of steps after which the schedule ends; None if it never ends.

        Call `resolve` first if a duration is a time string.
        """
        steps = (getattr(self, name) for name in _LENGTH_FIELDS if hasattr(self, name))
        return next((math.ceil(each) for each in steps if each is not None), None)

    @property
    def span(self) -> int:
        """Number of steps to plot. Call `resolve` first if a duration is a time string."""
        steps = [
            each
            for name, field in read_fields(type(self)).items()
            if field.duration is not None
            for each in as_tuple(getattr(self, name))
            if each is not None
        ]
        return 2 * int(max(steps, default=50))

    @abstractmethod
    def curves(self, base: Base) -> Curves:
        """Return the curve of each hyperparameter in each param group.

        Raises:
            ValueError: the parameters are incompatible with the initial hyperparameters, for
                example because a parameter is a single number but the groups have different
                learning rates.
        """

    def build_curves(self, base: Base, horizon: Horizon | None = None) -> Curves:
        """Resolve the schedule, and return the curve of each hyperparameter in each param group.

        For a feedback schedule, the curves show a run on a synthetic loss.

        Args:
            base: initial hyperparameters of the optimizer.
            horizon: length of the run, used to convert time strings to steps and to scale
                durations.

        Raises:
            ValueError: a duration cannot be converted to steps, or the schedule is incompatible
                with the initial hyperparameters.
        """
        curves = self.resolve(horizon).curves(base)
        if self.has_rate_per_step and horizon is not None:
            stretch = functools.partial(dilate, ratio=horizon.scale_ratio)
            curves = {name: build_curve_per_group(stretch, group) for name, group in curves.items()}
        return curves

    @overload
    def __call__(self, step: int, *, lr: float = ..., horizon: Horizon | None = ...) -> float: ...
    @overload
    def __call__(
        self, step: ArrayLike, *, lr: float = ..., horizon: Horizon | None = ...
    ) -> NDArray[Any] | float: ...
    def __call__(
        self, step: int | ArrayLike, *, lr: float = 0.1, horizon: Horizon | None = None
    ) -> NDArray[Any] | float:
        """Return the learning rate at a step, or an array of learning rates for an array of steps.

        Args:
            step: a step or an array of steps, each at least 0.
            lr: initial learning rate of the param group.
            horizon: length of the run, used to convert time strings to steps and to scale
                durations.

        Raises:
            ValueError: the schedule does not set the learning rate, or a step is negative.

        >>> from schedules import LinearLR
        >>> LinearLR(start_factor=0.5, total_iters=10)(5, lr=1.0)
        0.75
        """
        base = {"lr": (lr,), "momentum": (0.9,), "weight_decay": (0.0,)}
        curves = self.build_curves(base, horizon)
        if "lr" not in curves:
            names = " and ".join(curves)
            raise ValueError(
                f"Only a learning-rate schedule can be called, but {self.type_name} sets "
                f"only {names}. Call `schedules.trace` instead."
            )
        return curves["lr"][0](step)

    def bind(self, base: Base, horizon: Horizon | None = None) -> Controller[S]:
        """Return the controller that computes the values of this schedule for an optimizer.

        Args:
            base: initial hyperparameters of the optimizer.
            horizon: length of the run, used to convert time strings to steps and to scale
                durations.

        Raises:
            ValueError: a duration cannot be converted to steps, or the schedule is incompatible
                with the initial hyperparameters.
        """
        return cast("Controller[S]", OpenLoop(self.build_curves(base, horizon)))

    def per_group(self, groups: int) -> tuple[Self, ...]:
        """Return one schedule per param group, with that group's value in place of each list.

        Raises:
            ValueError: a list does not have one number per group.
        """
        lists = {
            name: broadcast(name, value, (0.0,) * groups)
            for name, value in self.lists_per_group.items()
        }
        if not lists:
            return (self,) * groups
        rows = (dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))
        return tuple(dataclasses.replace(self, **row) for row in rows)

    @property
    def num_groups(self) -> int | None:
        """Number of param groups if any field is a list with one number per group, else None."""
        return next(map(len, self.lists_per_group.values()), None)

    @property
    def lists_per_group(self) -> dict[str, tuple[float, ...]]:
        """Values of the fields that hold one number per param group, by field name."""
        return {
            name: value
            for name, field in read_fields(type(self)).items()
            if field.per_group and isinstance(value := getattr(self, name), tuple)
        }

    def params(self) -> dict[str, Any]:
        """Return the parameters that are required or differ from their defaults, as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, field in read_fields(type(self)).items()
            if (value := getattr(self, name)) != field.default or field.required
        }


class LearningRateSchedule(Schedule[int]):
    """Base class of schedules that set only the learning rate.

    The curve of a param group depends on the group's initial learning rate.
    """

    def curves(self, base: Base) -> Curves:
        """Return the learning rate curve of each param group."""
        lrs = base["lr"]
        make = type(self).curve
        return {"lr": build_curve_per_group(make, self.per_group(len(lrs)), lrs)}

    @abstractmethod
    def curve(self, lr: float) -> Curve:
        """Return the curve of a param group with initial learning rate ``lr``."""

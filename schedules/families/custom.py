"""Your own functions and classes as schedules, named in a config as ``module:attribute``.

A function of the step becomes a multiplier of the learning rate. A scheduler class with PyTorch's
interface (LambdaLR, MultiplicativeLR, your own) runs on a private optimizer and its learning rates
are recorded, so it is previewed, resumed and checked like any other schedule. Limits of such a
class: a step is reached only by stepping to it, durations are step counts and cannot be scaled, and
it sets only the learning rate.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

from schedules.core.controller import Base, Curves
from schedules.core.curves import Curve, from_function
from schedules.core.durations import Horizon
from schedules.core.fields import AnyValue
from schedules.core.imports import import_attribute
from schedules.core.schedule import (
    LearningRateSchedule,
    ParameterProblem,
    Schedule,
    ScheduleError,
    schedule_class,
)

__all__ = ["FunctionSchedule", "WrappedScheduler", "adapt", "torch_scheduler_names"]

TORCH_MODULE = "torch.optim.lr_scheduler"
_ABSTRACT = "LRScheduler"


@functools.cache
def torch_scheduler_names() -> frozenset[str]:
    """Return the names of PyTorch's scheduler classes without importing PyTorch."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return frozenset()
    source = Path(package.origin).parent / "optim" / "lr_scheduler.py"
    classes = [
        node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)
    ]
    return frozenset(node.name for node in classes if not node.name.startswith("_")) - {_ABSTRACT}


def adapt(found: Any, path: str) -> type[Schedule[Any]]:
    """Return a schedule class for a function or for a scheduler class with PyTorch's interface.

    Raises:
        ValueError: ``found`` is neither, or the class's ``step`` requires arguments.
    """
    if isinstance(found, type) and _is_torch_scheduler(found):
        return wrap_scheduler(found, path)
    if callable(found) and not isinstance(found, type):
        return FunctionSchedule.make_class(path, found)
    raise ValueError(
        "`scheduler.type` must name a scheduler class or a function of the step, but "
        f"{path!r} is {found!r}."
    )


def _is_torch_scheduler(cls: type) -> bool:
    name = f"{TORCH_MODULE}.{_ABSTRACT}"
    return any(f"{base.__module__}.{base.__name__}" == name for base in cls.__mro__)


def wrap_scheduler(cls: type[Any], name: str) -> type[WrappedScheduler]:
    """Return a schedule class, called ``name`` in a config, that runs a PyTorch-style scheduler.

    Its parameters are those of the scheduler's constructor, except the optimizer. A string such as
    "module:attribute" is imported, for parameters that are functions.

    Raises:
        ValueError: the scheduler's ``step`` requires arguments, or its constructor's parameters
            cannot be read.
    """
    required = [
        parameter.name
        for parameter in list(inspect.signature(cls.step).parameters.values())[1:]
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if required:
        raise ValueError(
            f"`scheduler.type` {name!r} must depend only on the step, but its `step` method "
            f"requires `{required[0]}`. Use a scheduler whose `step` takes no arguments."
        )
    fields = [
        (
            parameter.name,
            Annotated[Any, AnyValue()],
            dataclasses.field(
                default=dataclasses.MISSING
                if parameter.default is parameter.empty
                else parameter.default,
                metadata={"description": f"Passed to {cls.__name__}."},
            ),
        )
        for parameter in list(inspect.signature(cls).parameters.values())[1:]
        if parameter.name not in {"last_epoch", "verbose"}
    ]
    schedule: Any = dataclasses.make_dataclass(
        cls.__name__,
        fields,
        bases=(WrappedScheduler,),
        frozen=True,
        kw_only=True,
        namespace={"wrapped": cls, "__doc__": f"PyTorch scheduler: {inspect.getdoc(cls)}"},
    )
    schedule.type_name = name
    return cast("type[WrappedScheduler]", schedule)


@schedule_class
class WrappedScheduler(Schedule[int]):
    """Schedule with the learning rates that a PyTorch-style scheduler class sets at each step."""

    wrapped: ClassVar[type[Any]]

    def find_problems(self) -> Iterator[ParameterProblem]:
        try:
            _Recorder(self, (0.1,))
        except (TypeError, ValueError) as error:
            yield ParameterProblem(
                None, f"{self.wrapped.__name__} rejects its parameters: {error}."
            )

    def resolve(self, horizon: Horizon | None = None) -> WrappedScheduler:
        """Return the schedule itself; its durations are step counts and cannot be scaled."""
        if horizon is not None and horizon.scale_ratio != 1:
            message = (
                f"`engine.scale_schedule_ratio` must be 1 with {self.type_name}, got "
                f"{horizon.scale_ratio:g}. Scale the parameters of {self.type_name} instead."
            )
            raise ScheduleError(self.type_name, [ParameterProblem(None, message)])
        return self

    def curves(self, base: Base) -> Curves:
        recorder = _Recorder(self, base["lr"])
        return {
            "lr": tuple(
                from_function(functools.partial(recorder.lr, group))
                for group in range(len(base["lr"]))
            )
        }


class _Recorder:
    """Runs a scheduler on an optimizer of its own and records the learning rate of every step."""

    def __init__(self, schedule: WrappedScheduler, lrs: tuple[float, ...]) -> None:
        import torch

        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
        self._optimizer = torch.optim.SGD(groups, lr=lrs[0])
        params = {name: _import_functions(value) for name, value in schedule.params().items()}
        self._scheduler = schedule.wrapped(self._optimizer, **params)
        self._lrs = [self._current_lrs()]

    def _current_lrs(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def lr(self, group: int, step: float) -> float:
        while len(self._lrs) <= step:
            self._optimizer.step()
            self._scheduler.step()
            self._lrs.append(self._current_lrs())
        return self._lrs[int(step)][group]


def _import_functions(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_import_functions(each) for each in value]
    if not isinstance(value, str) or ":" not in value:
        return value
    return import_attribute(value)


@schedule_class
class FunctionSchedule(LearningRateSchedule):
    """Multiply the learning rate by a function of the step: ``lr(k) = lr * function(k)``.

    With r = ``engine.scale_schedule_ratio`` it is ``lr(k) = lr * function(k / r)``.
    """

    has_rate_per_step = True
    function: ClassVar[Any]

    @staticmethod
    def make_class(name: str, function: Callable[[float], float]) -> type[FunctionSchedule]:
        """Return a schedule class, called ``name`` in a config, for a function of the step.

        >>> halving = FunctionSchedule.make_class("halving", lambda k: 0.5 ** (k // 100))
        >>> halving().curves({"lr": (0.1,)})["lr"][0](250)
        0.025
        """
        body: dict[str, Any] = {"function": staticmethod(function), "__doc__": function.__doc__}
        class_name = getattr(function, "__name__", name)
        cls = types.new_class(
            class_name,
            (FunctionSchedule,),
            {"type_name": name},
            lambda namespace: namespace.update(body),
        )
        return cast("type[FunctionSchedule]", cls)

    def curve(self, lr: float) -> Curve:
        function = self.function
        return from_function(lambda k: lr * function(k))

"""Custom schedules, which a config specifies as ``module:attribute``.

A custom schedule can be a function or a subclass of PyTorch's LRScheduler, such as LambdaLR. A
function maps the step to a factor by which the learning rate is multiplied. A scheduler class runs
on a dummy optimizer and its learning rates are recorded, so that the schedule can be previewed and
resumed. Scheduler classes have three limitations: the value at a step requires running all previous
steps, durations are numbers of steps that cannot be scaled, and only the learning rate can be set.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import types
from collections import deque
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

__all__ = [
    "FunctionSchedule",
    "WrappedScheduler",
    "adapt",
    "read_torch_parameters",
]

TORCH_MODULE = "torch.optim.lr_scheduler"
_ABSTRACT = "LRScheduler"
_NOT_IN_CONFIGS = {"last_epoch", "verbose"}
_MAX_RECORDED = 1024  # learning rates that a recorder keeps, of all param groups together


@functools.cache
def _read_torch_classes() -> dict[str, ast.ClassDef]:
    """Read PyTorch's scheduler classes from its source code, without importing PyTorch."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return {}
    source = Path(package.origin).parent / "optim" / "lr_scheduler.py"
    classes = [
        node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)
    ]
    return {
        node.name: node
        for node in classes
        if not node.name.startswith("_") and node.name != _ABSTRACT
    }


def read_torch_parameters(name: str) -> dict[str, bool] | None:
    """Return the parameters of a PyTorch scheduler; see `schedules.core.registry`."""
    cls = _read_torch_classes().get(name)
    if cls is None:
        return None
    methods = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
    (arguments,) = (node.args for node in methods if node.name == "__init__")
    names = [each.arg for each in arguments.args[2:]]  # without self and the optimizer
    required = len(names) - len(arguments.defaults)
    found = {each: index < required for index, each in enumerate(names)}
    found |= {
        each.arg: default is None
        for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    }
    return {each: needed for each, needed in found.items() if each not in _NOT_IN_CONFIGS}


def adapt(found: Any, path: str) -> type[Schedule[Any]]:
    """Return a schedule class that wraps a function or a subclass of PyTorch's ``LRScheduler``.

    Args:
        found: function or class to wrap.
        path: import path of ``found``, which is also the name of the schedule in a config.

    Raises:
        ValueError: ``found`` is neither a function nor a scheduler class, or the ``step`` method of
            the class requires arguments.
    """
    if isinstance(found, type) and _is_torch_scheduler(found):
        return wrap_scheduler(found, path)
    if callable(found) and not isinstance(found, type):
        return FunctionSchedule.make_class(path, found)
    raise ValueError(
        "`scheduler.type` must be the import path of a scheduler class or of a function of the "
        f"step, got {path!r}, which is {found!r}."
    )


def _is_torch_scheduler(cls: type) -> bool:
    name = f"{TORCH_MODULE}.{_ABSTRACT}"
    return any(f"{base.__module__}.{base.__name__}" == name for base in cls.__mro__)


def wrap_scheduler(cls: type[Any], name: str) -> type[WrappedScheduler]:
    """Create a schedule class that wraps a subclass of PyTorch's ``LRScheduler``.

    The schedule has the parameters of the scheduler's constructor, except the optimizer. If a
    parameter is a function, the config specifies it as "module:attribute".

    Args:
        cls: scheduler class to wrap.
        name: name of the schedule in a config.

    Raises:
        ValueError: the scheduler's ``step`` requires arguments, or the signature of its constructor
            is not available.
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
            f"requires the argument `{required[0]}`. Use a scheduler that does not require it."
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
        if parameter.name not in _NOT_IN_CONFIGS
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
    """Schedule with the learning rates of a subclass of PyTorch's ``LRScheduler``."""

    wrapped: ClassVar[type[Any]]

    def find_problems(self) -> Iterator[ParameterProblem]:
        try:
            _Recorder(self, (0.1,))
        except (TypeError, ValueError) as error:
            yield ParameterProblem(
                None, f"The parameters of {self.wrapped.__name__} are invalid: {error}."
            )

    def resolve(self, horizon: Horizon | None = None) -> WrappedScheduler:
        """Return the schedule unchanged, because its durations are already numbers of steps.

        Raises:
            ScheduleError: ``horizon.scale_ratio`` is not 1. The schedule cannot be scaled.
        """
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
    """Runs a scheduler on a dummy optimizer, and records the learning rates of the last steps.

    The record has a limited size, so that a long run does not need more and more memory. To return
    the learning rate of a step before the record, the scheduler runs again from the first step.
    """

    def __init__(self, schedule: WrappedScheduler, lrs: tuple[float, ...]) -> None:
        self._schedule = schedule
        self._initial_lrs = lrs
        self._restart()

    def _restart(self) -> None:
        import torch

        lrs = self._initial_lrs
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
        self._optimizer = torch.optim.SGD(groups, lr=lrs[0])
        params = self._schedule.params()
        functions = {name: _import_functions(value) for name, value in params.items()}
        self._scheduler = self._schedule.wrapped(self._optimizer, **functions)
        self._step = 0
        self._lrs = deque([self._current_lrs()], maxlen=max(2, _MAX_RECORDED // len(lrs)))

    def _current_lrs(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def lr(self, group: int, step: float) -> float:
        if int(step) <= self._step - len(self._lrs):
            self._restart()
        while self._step < int(step):
            self._optimizer.step()
            self._scheduler.step()
            self._lrs.append(self._current_lrs())
            self._step += 1
        return self._lrs[int(step) - self._step - 1][group]


def _import_functions(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_import_functions(each) for each in value]
    if not isinstance(value, str) or ":" not in value:
        return value
    return import_attribute(value)


@schedule_class
class FunctionSchedule(LearningRateSchedule):
    """Multiply the learning rate by a function of the step: ``lr(k) = lr * function(k)``.

    If ``engine.scale_schedule_ratio`` is r, then ``lr(k) = lr * function(k / r)``.
    """

    has_rate_per_step = True
    function: ClassVar[Any]

    @staticmethod
    def make_class(name: str, function: Callable[[float], float]) -> type[FunctionSchedule]:
        """Create a schedule class with the given name from a function of the step.

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

"""Custom schedules, specified in a config as ``module:attribute``.

The attribute can be one of the following:

- a function that maps the step to a factor by which the learning rate is multiplied;
- a subclass of PyTorch's LRScheduler, such as LambdaLR;
- a function that builds such a scheduler for an optimizer, such as
  ``transformers:get_linear_schedule_with_warmup``. Its first parameter must be named ``optimizer``.

In the config, ``params`` can set the parameters of the function or of the class's constructor,
except the first (the step or the optimizer) and a scheduler's ``last_epoch`` and ``verbose``.

A PyTorch scheduler runs on a dummy optimizer, and its values are recorded, so that the schedule can
be previewed and resumed. There are two limitations:

- to compute the value at a step, the scheduler must run all previous steps;
- the scheduler's durations must be given in steps and cannot be scaled.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

from schedules.core.controller import Base, Curves, Values
from schedules.core.curves import Curve, from_function
from schedules.core.durations import Horizon
from schedules.core.fields import AnyValue
from schedules.core.imports import import_attribute
from schedules.core.per_group import build_curve_per_group
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

C = TypeVar("C", bound=Schedule[Any])

TORCH_MODULE = "torch.optim.lr_scheduler"
_ABSTRACT = "LRScheduler"
_NOT_IN_CONFIGS = {"last_epoch", "verbose"}
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_MAX_RECORDED = 1024  # learning rates that a recorder keeps, of all param groups together


@functools.cache
def _read_torch_classes() -> dict[str, ast.ClassDef]:
    """Return the syntax trees of PyTorch's scheduler classes by name, without importing PyTorch."""
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
    """Return a dict that maps each parameter of a PyTorch scheduler to whether it is required.

    The optimizer, ``last_epoch`` and ``verbose`` are omitted. Return None if PyTorch is not
    installed or has no scheduler with this name.
    """
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
        found: function of the step, subclass of ``LRScheduler``, or function that takes
            ``optimizer`` as its first parameter and returns such a scheduler.
        path: import path of ``found``. It is the name of the schedule in a config.

    Raises:
        ValueError: ``found`` is neither a function nor a scheduler class, or the ``step`` method of
            the class requires arguments.
    """
    if _is_torch_scheduler(found) if isinstance(found, type) else _builds_scheduler(found):
        return wrap_scheduler(found, path)
    if callable(found) and not isinstance(found, type):
        return FunctionSchedule.make_class(path, found)
    raise ValueError(
        "`scheduler.type` must be the import path of a scheduler class, of a function of the step, "
        f"or of a function that builds a scheduler, got {path!r} ({found!r})."
    )


def _is_torch_scheduler(cls: type) -> bool:
    name = f"{TORCH_MODULE}.{_ABSTRACT}"
    return any(f"{base.__module__}.{base.__name__}" == name for base in cls.__mro__)


def _builds_scheduler(function: Any) -> bool:
    """Return whether the first parameter of a function is named ``optimizer``."""
    try:
        return next(iter(inspect.signature(function).parameters), None) == "optimizer"
    except (TypeError, ValueError):  # not a function, or without a signature
        return False


def wrap_scheduler(cls: Any, name: str) -> type[WrappedScheduler]:
    """Create a schedule class that wraps a subclass of PyTorch's ``LRScheduler``.

    The schedule has the parameters of the scheduler's constructor, except the optimizer. If a
    parameter is a function, the config specifies it as "module:attribute".

    Args:
        cls: scheduler class to wrap, or function that returns a scheduler for an optimizer.
        name: name of the schedule in a config.

    Raises:
        ValueError: the scheduler's ``step`` requires arguments, or the signature of its constructor
            is not available.
    """
    step: Any = getattr(cls, "step", None)  # a function has none
    required = [
        parameter.name
        for parameter in (_parameters(step) if step is not None else ())
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if required:
        raise ValueError(
            "`scheduler.type` must be a scheduler that depends only on the step, but the `step` "
            f"method of {name!r} requires the argument `{required[0]}`. Use a scheduler whose "
            "`step` method requires no arguments."
        )
    parameters = [each for each in _named_parameters(cls) if each.name not in _NOT_IN_CONFIGS]
    namespace = {
        "wrapped": staticmethod(cls),
        "__doc__": f"PyTorch scheduler: {inspect.getdoc(cls)}",
    }
    return _make_class(WrappedScheduler, cls.__name__, name, parameters, namespace)


def _parameters(function: Any) -> list[inspect.Parameter]:
    """Return all parameters of a function except the first.

    The first one is ``self``, the optimizer or the step.
    """
    return list(inspect.signature(function).parameters.values())[1:]


def _make_class(
    base: type[C],
    class_name: str,
    type_name: str,
    parameters: Iterable[inspect.Parameter],
    namespace: dict[str, Any],
) -> type[C]:
    """Create a subclass of ``base`` with one field for each of ``parameters``."""
    fields = [
        (
            parameter.name,
            Annotated[Any, AnyValue()],
            dataclasses.field(
                default=_convert_default(parameter.default),
                metadata={"description": f"Passed to {class_name}."},
            ),
        )
        for parameter in parameters
    ]
    cls: Any = dataclasses.make_dataclass(
        class_name,
        fields,
        bases=(base,),
        frozen=True,
        kw_only=True,
        repr=False,
        namespace=namespace,
    )
    cls.type_name = type_name
    return cast("type[C]", cls)


def _convert_default(default: Any) -> Any:
    """Convert a parameter's default to a dataclass field's default. A list becomes a tuple."""
    if default is inspect.Parameter.empty:
        return dataclasses.MISSING
    return tuple(default) if isinstance(default, list) else default


@schedule_class
class WrappedScheduler(Schedule[int]):
    """Schedule that sets the same values as the PyTorch scheduler that it wraps."""

    wrapped: ClassVar[Any]

    def find_problems(self) -> Iterator[ParameterProblem]:
        try:
            _ = self._written
        except (TypeError, ValueError) as error:
            yield ParameterProblem(
                None, f"The parameters of {self.wrapped.__name__} are invalid: {error}."
            )

    @functools.cached_property
    def _written(self) -> tuple[str, ...]:
        """Names of the hyperparameters that the scheduler sets during its first steps.

        The names are found by running the scheduler on a dummy optimizer. The dummy optimizer has
        one param group per item of the longest list among the scheduler's arguments. If the
        scheduler raises an error, it is run again with one param group per item of the next shorter
        list, and finally with a single param group.
        """
        lists = {len(value) for value in self.params().values() if isinstance(value, list)}
        errors = []
        for groups in (*sorted(lists, reverse=True), 1):
            try:
                recorder = _Recorder(
                    self, {name: (each,) * groups for name, each in _TRIAL.items()}
                )
            except (TypeError, ValueError) as error:
                errors.append(error)
                continue
            rows = recorder.row(0), recorder.row(1)
            changed = (n for n in _TRIAL if any(set(row[n]) != {_TRIAL[n]} for row in rows))
            return tuple(dict.fromkeys(("lr", *changed)))
        raise errors[0]

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        return self._written

    def __reduce__(self) -> Any:
        # The class was created at run time, so pickle cannot import it.
        params = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _rebuild, (type(self).wrapped, self.type_name, params)

    def resolve(self, horizon: Horizon | None = None) -> WrappedScheduler:
        """Return the schedule unchanged, because its durations are already in steps.

        Raises:
            ScheduleError: ``horizon.scale_ratio`` is not 1, but this schedule cannot be scaled.
        """
        if horizon is not None and horizon.scale_ratio != 1:
            message = (
                f"`engine.scale_schedule_ratio` must be 1 with {self.type_name}, got "
                f"{horizon.scale_ratio:g}. Scale the parameters of {self.type_name} instead."
            )
            raise ScheduleError(self.type_name, [ParameterProblem(None, message)])
        return self

    def curves(self, base: Base) -> Curves:
        recorder = _Recorder(self, base)
        rows = list(zip(*base.values(), strict=True))
        # A list can have one item per group. Otherwise, groups with equal values share a curve.
        is_per_group = any(isinstance(value, list) for value in self.params().values())
        first = list(range(len(rows))) if is_per_group else [rows.index(row) for row in rows]
        return {
            name: build_curve_per_group(functools.partial(recorder.curve, name), tuple(first))
            for name in self.hyperparameters
        }


_TRIAL = {"lr": 0.1, "momentum": 0.123, "weight_decay": 0.0123}
"""Initial hyperparameters of the dummy optimizer: values that a scheduler is unlikely to set."""


class _Recorder:
    """Recorder of the latest values that a scheduler has set on a dummy optimizer.

    The number of recorded steps is limited, so that memory use does not grow with the length of the
    run. To return the values of a step that is no longer recorded, the recorder runs the scheduler
    again from the first step.
    """

    def __init__(self, schedule: WrappedScheduler, base: Base) -> None:
        self._schedule = schedule
        self._base = base
        self._restart()

    def _restart(self) -> None:
        import torch

        groups = [
            {
                "params": [torch.nn.Parameter(torch.zeros(1))],
                **{name: values[group] for name, values in self._base.items()},
            }
            for group in range(len(self._base["lr"]))
        ]
        self._optimizer = torch.optim.SGD(groups, lr=self._base["lr"][0])
        self._scheduler = self._schedule.wrapped(self._optimizer, **_import_params(self._schedule))
        self._step = 0
        self._rows = deque([self._read()], maxlen=max(2, _MAX_RECORDED // len(groups)))

    def _read(self) -> Values:
        groups = self._optimizer.param_groups
        return {name: tuple(float(group[name]) for group in groups) for name in _TRIAL}

    def row(self, step: int) -> Values:
        """Return the hyperparameters of all param groups at a step."""
        if step <= self._step - len(self._rows):
            self._restart()
        while self._step < step:
            self._optimizer.step()
            self._scheduler.step()
            self._rows.append(self._read())
            self._step += 1
        return self._rows[step - self._step - 1]

    def curve(self, name: str, group: int) -> Curve:
        """Return the curve of a hyperparameter of one param group."""
        return from_function(functools.partial(self.value, name, group))

    def value(self, name: str, group: int, step: float) -> float:
        """Return a hyperparameter of one param group at a step."""
        return self.row(int(step))[name][group]


def _import_params(schedule: Schedule[Any]) -> dict[str, Any]:
    """Return ``schedule.params()``, with each import path replaced by the imported object."""
    return {name: _import_functions(value) for name, value in schedule.params().items()}


def _import_functions(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_import_functions(each) for each in value]
    if not isinstance(value, str) or ":" not in value:
        return value
    return import_attribute(value)


@schedule_class
class FunctionSchedule(LearningRateSchedule):
    """Multiply the learning rate by a function of the step: ``lr(k) = lr * function(k, **params)``.

    If ``engine.scale_schedule_ratio`` is r, then ``lr(k) = lr * function(k / r, **params)``.
    """

    has_rate_per_step = True
    function: ClassVar[Any]

    @staticmethod
    def make_class(name: str, function: Callable[..., float]) -> type[FunctionSchedule]:
        """Create a schedule class with the given name from a function of the step.

        The schedule has the parameters of the function, except the first, which is the step.

        >>> halving = FunctionSchedule.make_class("halving", lambda k, every=1: 0.5 ** (k // every))
        >>> halving(every=100).curves({"lr": (0.1,)})["lr"][0](250)
        0.025
        """
        body: dict[str, Any] = {"function": staticmethod(function), "__doc__": function.__doc__}
        class_name = getattr(function, "__name__", name)
        return _make_class(FunctionSchedule, class_name, name, _named_parameters(function), body)

    def __reduce__(self) -> Any:
        # The class was created at run time, so pickle cannot import it.
        params = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _rebuild, (type(self).function, self.type_name, params)

    def curves(self, base: Base) -> Curves:
        # The base class would compute the hash of the schedule, whose params can be dicts.
        return {"lr": build_curve_per_group(self.curve, base["lr"])}

    def curve(self, lr: float) -> Curve:
        function = functools.partial(self.function, **_import_params(self))
        return from_function(lambda k: lr * function(k))


def _named_parameters(function: Any) -> list[inspect.Parameter]:
    """Return the parameters that a function accepts by name, except its first parameter."""
    try:
        parameters = _parameters(function)
    except (TypeError, ValueError):  # without a signature, such as some functions in C
        return []
    return [each for each in parameters if each.kind in _BY_NAME]


def _rebuild(found: Any, path: str, params: dict[str, Any]) -> Schedule[Any]:
    return adapt(found, path)(**params)

"""Your own functions and classes as schedules, named in a config as ``module:attribute``.

A function of the step becomes a multiplier of the learning rate. A scheduler class with PyTorch's
interface (LambdaLR, MultiplicativeLR, your own) runs on a private optimizer and its learning rates
are recorded, so it is previewed, resumed and checked like any other schedule. Limits of such a
class: a step is reached only by stepping to it, durations are step counts and cannot be scaled, and
it drives only the learning rate.
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

from schedules.core.curves import Curve, from_function
from schedules.core.durations import Horizon
from schedules.core.fields import AnyValue
from schedules.core.imports import import_attribute
from schedules.core.schedule import (
    Base,
    Curves,
    Fault,
    LearningRateSchedule,
    Schedule,
    ScheduleError,
)

__all__ = ["FunctionSchedule", "WrappedScheduler", "adapt", "torch_scheduler_names"]

TORCH_MODULE = "torch.optim.lr_scheduler"
_ABSTRACT = "LRScheduler"


@functools.cache
def torch_scheduler_names() -> frozenset[str]:
    """Return the names of PyTorch's scheduler classes, without importing it."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return frozenset()
    source = Path(package.origin).parent / "optim" / "lr_scheduler.py"
    classes = [
        node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)
    ]
    return frozenset(node.name for node in classes if not node.name.startswith("_")) - {_ABSTRACT}


def adapt(found: Any, path: str) -> type[Schedule[Any]]:
    """Return the schedule class for a function or a scheduler class with PyTorch's interface.

    Raises:
        ValueError: it is neither, or the class needs more than the step count.
    """
    if isinstance(found, type) and _is_torch_scheduler(found):
        return wrap(found, path)
    if callable(found) and not isinstance(found, type):
        return FunctionSchedule.of(path, found)
    raise ValueError(
        f"`scheduler.type` must name a schedule's class or a function of the update, but {path!r} "
        f"is {found!r} instead."
    )


def _is_torch_scheduler(cls: type) -> bool:
    name = f"{TORCH_MODULE}.{_ABSTRACT}"
    return any(f"{base.__module__}.{base.__name__}" == name for base in cls.__mro__)


def wrap(cls: type[Any], name: str) -> type[WrappedScheduler]:
    """Return the schedule that runs a class in the manner of torch's, under a config's name for it.

    Its parameters are the constructor's, but for the optimizer. A string ``module:attribute`` in
    place of a function is imported.

    Raises:
        ValueError: the class needs more than the count of updates, or its constructor's parameters
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
            f"`scheduler.type` {name!r} must step by the count of updates alone, but needs "
            f"`{required[0]}` at each step."
        )
    fields = [
        (
            parameter.name,
            Annotated[Any, AnyValue()],
            dataclasses.field(
                default=dataclasses.MISSING
                if parameter.default is parameter.empty
                else parameter.default,
                metadata={"description": f"As {cls.__name__} takes it."},
            ),
        )
        for parameter in list(inspect.signature(cls).parameters.values())[1:]
        if parameter.name not in {"last_epoch", "verbose"}
    ]
    made: Any = dataclasses.make_dataclass(
        cls.__name__,
        fields,
        bases=(WrappedScheduler,),
        frozen=True,
        kw_only=True,
        namespace={"wrapped": cls, "__doc__": f"{TORCH_MODULE}'s way: {inspect.getdoc(cls)}"},
    )
    made.type_name = name
    return cast("type[WrappedScheduler]", made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrappedScheduler(Schedule[int]):
    """The learning rates of a scheduler class in PyTorch's manner, update by update."""

    wrapped: ClassVar[type[Any]]

    def faults(self) -> Iterator[Fault]:
        try:
            _Walk(self, (0.1,))
        except (TypeError, ValueError) as error:
            yield Fault(None, f"{self.wrapped.__name__} refuses its parameters: {error}.")

    def resolve(self, horizon: Horizon | None = None) -> WrappedScheduler:
        """Return the schedule itself; it has no durations that could be scaled."""
        if horizon is not None and horizon.scale_ratio != 1:
            message = (
                f"`engine.scale_schedule_ratio` must be 1 with {self.type_name}, whose durations "
                f"are its own affair, but is {horizon.scale_ratio:g} instead."
            )
            raise ScheduleError(self.type_name, [Fault(None, message)])
        return self

    def curves(self, base: Base) -> Curves:
        walk = _Walk(self, base["lr"])
        return {
            "lr": tuple(
                from_function(functools.partial(walk.lr, group)) for group in range(len(base["lr"]))
            )
        }


class _Walk:
    """A scheduler at work on an optimizer of its own, and the learning rates that it came by."""

    def __init__(self, schedule: WrappedScheduler, lrs: tuple[float, ...]) -> None:
        import torch

        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
        self._optimizer = torch.optim.SGD(groups, lr=lrs[0])
        params = {name: _imported(value) for name, value in schedule.params().items()}
        self._scheduler = schedule.wrapped(self._optimizer, **params)
        self._lrs = [self._written()]

    def _written(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def lr(self, group: int, step: float) -> float:
        while len(self._lrs) <= step:
            self._optimizer.step()
            self._scheduler.step()
            self._lrs.append(self._written())
        return self._lrs[int(step)][group]


def _imported(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_imported(each) for each in value]
    if not isinstance(value, str) or ":" not in value:
        return value
    return import_attribute(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionSchedule(LearningRateSchedule):
    """``lr(k) = lr * function(k)``; a scale schedule ratio r makes it ``lr * function(k / r)``."""

    clock_is_step = True
    function: ClassVar[Any]

    @staticmethod
    def of(name: str, function: Callable[[float], float]) -> type[FunctionSchedule]:
        """Return the schedule of a function, under the name by which a config calls it.

        >>> halving = FunctionSchedule.of("halving", lambda k: 0.5 ** (k // 100))
        >>> halving().curves({"lr": (0.1,)})["lr"][0](250)
        0.025
        """
        body: dict[str, Any] = {"function": staticmethod(function), "__doc__": function.__doc__}
        name_of_function = getattr(function, "__name__", name)
        cls = types.new_class(
            name_of_function,
            (FunctionSchedule,),
            {"type_name": name},
            lambda into: into.update(body),
        )
        return cast("type[FunctionSchedule]", cls)

    def curve(self, lr: float) -> Curve:
        function = self.function
        return from_function(lambda k: lr * function(k))

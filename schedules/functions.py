"""A plain function of the update as a schedule: a multiplier of each group's own learning rate."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any, ClassVar, cast

from schedules.curves import Curve, from_function
from schedules.schedule import LearningRateSchedule

__all__ = ["FunctionSchedule"]


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

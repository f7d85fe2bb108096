"""Apply a separate schedule to each param group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from schedules.core.controller import Base, Curves
from schedules.core.curves import Curve, constant
from schedules.core.durations import Horizon
from schedules.core.fields import AnyValue
from schedules.core.parts import ScheduleOfParts
from schedules.core.schedule import ParameterProblem, Schedule, schedule_class

__all__ = ["PerGroup"]


@schedule_class
class PerGroup(ScheduleOfParts):
    """Apply a separate schedule to each param group.

    `schedules.attach` builds this schedule from a dict that maps param groups to schedules.
    `engine.initialize` builds it from the entries of ``optimizer.param_groups`` in the config.
    If a schedule sets an absolute learning rate as a single number, all groups that use this
    schedule must have the same initial learning rate. A group keeps the initial value of each
    hyperparameter that its schedule does not set.

    >>> import schedules
    >>> warmup = schedules.LinearLR(start_factor=0.0, total_iters=2)
    >>> cooldown = schedules.LinearLR(start_factor=10.0, total_iters=2)
    >>> curves = PerGroup(schedulers=(warmup, cooldown, None)).curves({"lr": (0.1, 0.1, 0.1)})
    >>> [list(curve.values(3)) for curve in curves["lr"]]
    [[0.0, 0.05, 0.1], [1.0, 0.55, 0.1], [0.1, 0.1, 0.1]]
    """

    schedulers: Annotated[Any, AnyValue()]
    """One `Schedule` per param group, in order. A group with None keeps its initial values."""

    def _convert_fields(self) -> Iterator[ParameterProblem]:
        yield from super()._convert_fields()
        for index, part in enumerate(self.schedulers):
            if part is not None and part.feedback is not None:
                message = (
                    f"The schedule of a single param group (here group {index}) must not depend on "
                    f"the {part.feedback}, got {part.type_name}. Use it for all groups instead."
                )
                yield ParameterProblem("schedulers", message)

    @property
    def parts(self) -> tuple[Schedule[Any], ...]:
        """The schedules of the param groups, without duplicates."""
        found: list[Schedule[Any]] = []
        for part in self.schedulers:
            if part is not None and part not in found:
                found.append(part)
        return tuple(found)

    def warnings(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.warnings()

    def resolve(self, horizon: Horizon | None = None) -> PerGroup:
        resolved = [(part, part.resolve(horizon)) for part in self.parts]
        schedulers = tuple(
            next((each for whole, each in resolved if whole == part), None)
            for part in self.schedulers
        )
        return PerGroup(schedulers=schedulers)

    def params(self) -> dict[str, Any]:
        blocks: list[Mapping[str, Any] | None] = [
            None if part is None else {"type": part.type_name, "params": part.params()}
            for part in self.schedulers
        ]
        return {"schedulers": blocks}

    def curves(self, base: Base) -> Curves:
        return self._build(base, lambda part, own: part.curves(own))

    def build_curves(self, base: Base, horizon: Horizon | None = None) -> Curves:
        return self._build(base, lambda part, own: part.build_curves(own, horizon))

    def _build(self, base: Base, build: Callable[[Schedule[Any], Base], Curves]) -> Curves:
        """Return the curves of all param groups, calling ``build`` once per distinct schedule."""
        count = len(base["lr"])
        if len(self.schedulers) != count:
            raise ValueError(
                f"The number of schedules must equal the number of param groups ({count}), got "
                f"{len(self.schedulers)}. Attach the schedules again, one for each param group."
            )
        curves: dict[str, list[Curve]] = {
            name: [constant(value) for value in base[name]] for name in self.hyperparameters
        }
        for part in self.parts:
            groups = [index for index, each in enumerate(self.schedulers) if each == part]
            own = {name: tuple(values[index] for index in groups) for name, values in base.items()}
            for name, in_groups in build(part, own).items():
                for index, curve in zip(groups, in_groups, strict=True):
                    curves[name][index] = curve
        return {name: tuple(in_groups) for name, in_groups in curves.items()}

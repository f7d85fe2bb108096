"""Base class of composite schedules, which are built from other schedules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from schedules.core.schedule import Schedule

__all__ = ["ScheduleOfParts"]


class ScheduleOfParts(Schedule[int]):
    """Base class of schedules that are built from the schedules in their ``schedulers`` field."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Schedule[Any]]:
        """The schedules that make up this schedule."""

    @property
    @override
    def hyperparameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.hyperparameters))

    @property
    @override
    def length(self) -> int | None:
        lengths = [part.length for part in self.parts]
        return None if None in lengths else max(filter(None, lengths), default=0)

    @property
    @override
    def span(self) -> int:
        return max(part.span for part in self.parts)

    @property
    @override
    def unresolved_fields(self) -> tuple[str, ...]:
        nested = ("schedulers",) if any(part.unresolved_fields for part in self.parts) else ()
        return super().unresolved_fields + nested

"""What a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.parser import Document
from engine.config.schema import Member
from engine.errors import Problem

__all__ = ["Checked", "Rule"]


@dataclass(frozen=True)
class Checked:
    """A config whose values are right by themselves.

    ``config`` is without what is wrong, and without each "auto" that an integration fills in; their
    JSON pointers are in ``unsure``, and so are those of keys that were probably meant by unknown
    ones. ``members`` are all known keys, with their schemas. ``world_size`` is None for any number.
    """

    document: Document
    config: Mapping[str, Any]
    members: Sequence[Member]
    unsure: Collection[str]
    world_size: int | None

    def section(self, name: str) -> Mapping[str, Any]:
        """Return a section; an empty one where it is absent or no object."""
        value = self.config.get(name)
        return value if isinstance(value, Mapping) else {}

    def enabled(self, name: str) -> bool:
        """Return whether a section is there and switched on."""
        return self.section(name).get("enabled") is True

    def lacks(self, pointer: str) -> bool:
        """Return whether a key is absent, and not only wrong, misspelt or left to be filled in."""
        if any(pointer == each or pointer.startswith(f"{each}/") for each in self.unsure):
            return False
        value: Any = self.config
        for key in pointer.split("/")[1:]:
            if not isinstance(value, Mapping) or key not in value:
                return True
            value = value[key]
        return False

    @property
    def stage(self) -> int | None:
        """The ZeRO stage; None where what it will be is not known."""
        zero = self.config.get("zero_optimization", {})
        if isinstance(zero, bool):
            return int(zero)
        default = 0 if self.lacks("/zero_optimization/stage") else None
        stage: int | None = zero.get("stage", default) if isinstance(zero, Mapping) else default
        return stage

    def error(self, rule: str, pointer: str, message: str, hint: str = "", **more: Any) -> Problem:
        """Return a problem that must be mended."""
        return self.document.problem(rule, pointer, message, hint, **more)

    def warning(self, rule: str, pointer: str, message: str, hint: str = "") -> Problem:
        """Return a problem that the run survives, but that is hardly meant."""
        return self.document.problem(rule, pointer, message, hint, severity="warning")

    def note(self, rule: str, pointer: str, message: str, hint: str = "") -> Problem:
        """Return what is worth knowing, and often meant."""
        return self.document.problem(rule, pointer, message, hint, severity="note")


Rule = Callable[[Checked], Iterator[Problem]]

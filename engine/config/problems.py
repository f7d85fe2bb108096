"""Problems: what is wrong with a config, as data. Their formatting is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ConfigError", "Fix", "Problem", "pointer_to"]


@dataclass(frozen=True)
class Fix:
    """A repair that needs no thought: the key to write in place of this one, or the value."""

    key: str | None = None
    value: Any = None


@dataclass(frozen=True)
class Problem:
    """One finding about a config.

    ``rule`` is a stable name (`onecycle explain` has its page), ``severity`` "error", "warning" or
    "note", ``pointer`` a JSON pointer (RFC 6901; "" is the whole config), ``line`` and ``column``
    count from 1 and are 0 where the config is no file.
    """

    rule: str
    severity: str
    pointer: str
    line: int
    column: int
    message: str
    hint: str = ""
    fix: Fix | None = None
    suggestion: str = ""
    """The key that was probably meant, in the same object as an unknown one."""

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class ConfigError(ValueError):
    """A config that must not be run; ``problems`` holds every one that was found.

    ValueError
    └── ConfigError
    """

    def __init__(self, name: str, problems: Sequence[Problem]) -> None:
        self.name = name
        self.problems = tuple(problems)
        lines = [
            f"{name}:{problem.line}:{problem.column}: {problem}"
            if problem.line
            else f"{name}: {problem.pointer or 'the config'}: {problem}"
            for problem in self.problems
        ]
        super().__init__("\n".join(lines))


def pointer_to(parent: str, key: str | int) -> str:
    """Return the JSON pointer of a member.

    >>> pointer_to("/engine", "a/b")
    '/engine/a~1b'
    """
    return f"{parent}/{str(key).replace('~', '~0').replace('/', '~1')}"

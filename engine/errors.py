"""Exceptions that users catch, and the problems of an invalid config.

::

    ValueError
    ├── ConfigError        an invalid config
    ├── CheckpointError    a checkpoint that cannot be saved or loaded
    └── LaunchError        a launch that cannot start
    RuntimeError
    └── MisuseError        a method called at the wrong time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CheckpointError", "ConfigError", "Fix", "LaunchError", "MisuseError", "Problem"]


@dataclass(frozen=True)
class Fix:
    """A change to a config that can be applied automatically: a new key or a new value."""

    key: str | None = None
    value: Any = None


@dataclass(frozen=True)
class Problem:
    """One problem of a config.

    ``rule`` is a stable ID (`onecycle explain` prints its page), ``severity`` is "error", "warning"
    or "note", ``pointer`` is a JSON pointer (RFC 6901; "" is the whole config). ``line`` and
    ``column`` count from 1; they are 0 if the config is a dict.
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
    """The key that the user probably meant, in the same object as the unknown key."""

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class ConfigError(ValueError):
    """An invalid config; ``problems`` holds every problem that was found.

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


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved or loaded. Nothing was changed.

    ValueError
    └── CheckpointError
    """


class LaunchError(ValueError):
    """A launch that cannot start; the message names the option to change.

    ValueError
    └── LaunchError
    """


class MisuseError(RuntimeError, AssertionError):
    """A method called at the wrong time.

    It is also an `AssertionError`, because DeepSpeed raises that in these cases.

    RuntimeError
    └── MisuseError
    """

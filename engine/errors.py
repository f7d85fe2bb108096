"""The exceptions of this library, and the class `Problem` for problems in a config.

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

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Fix",
    "LaunchError",
    "MisuseError",
    "Problem",
    "escape",
]

_MAX_LISTED = 100


def escape(text: str) -> str:
    """Return a string with nonprintable characters escaped, so that it is safe to print or log.

    Keys and values of a config can contain line breaks, terminal escape sequences, or characters
    that change the text direction.

    >>> escape("clear\\x1b[2J\\n::error::forged é")
    'clear\\\\x1b[2J\\\\n::error::forged é'
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


@dataclass(frozen=True)
class Fix:
    """An automatic fix for a config: a new name or value for a key.

    The user must confirm an unsafe fix, such as the suggested spelling of an unknown key.
    """

    key: str | None = None
    value: Any = None
    is_certain: bool = True
    """Whether the fix is safe, so that no confirmation is needed."""


@dataclass(frozen=True)
class Problem:
    """A problem in a config.

    ``rule`` is the ID of the rule that found the problem; `onecycle explain` describes each rule.
    ``severity`` is "error", "warning" or "note". ``pointer`` is the JSON pointer (RFC 6901) to the
    key, or "" for the whole config. ``line`` and ``column`` are 1-based, or 0 if the position is
    unknown, for example if the config is a dict.
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
    """For an unknown key, the key that the user probably meant. For a missing key, the JSON pointer
    of that key. Otherwise, ""."""

    def __str__(self) -> str:
        return escape(f"{self.message} {self.hint}".strip())


class ConfigError(ValueError):
    """Raised when a config is invalid.

    The class derives from `ValueError`.

    Args:
        name: name of the config in the message, such as its path.
        problems: all problems in the config.
        message: message of the exception; by default, a list of the first 100 problems.
    """

    def __init__(self, name: str, problems: Sequence[Problem], message: str = "") -> None:
        self.name = name
        self.problems = tuple(problems)
        self.message = message
        super().__init__(name, self.problems, message)  # unpickling passes these to `__init__`

    def __str__(self) -> str:
        lines = [
            escape(f"{self.name}:{problem.line}:{problem.column}: ") + str(problem)
            if problem.line
            else escape(f"{self.name}: {problem.pointer and f'{problem.pointer}: '}") + str(problem)
            for problem in self.problems[:_MAX_LISTED]
        ]
        if len(self.problems) > _MAX_LISTED:
            lines.append(f"… and {len(self.problems) - _MAX_LISTED:,} more")
        return self.message or "\n".join(lines)


class CheckpointError(ValueError):
    """Raised when a checkpoint cannot be saved or loaded.

    The class derives from `ValueError`.
    """


class LaunchError(ValueError):
    """Raised when a launch cannot start, for example because an option or the hostfile is invalid.

    The class derives from `ValueError`.
    """


class MisuseError(RuntimeError, AssertionError):
    """Raised when a method is called at the wrong time.

    The class derives from `RuntimeError`. It also derives from `AssertionError`, because DeepSpeed
    raises `AssertionError` in these cases.
    """

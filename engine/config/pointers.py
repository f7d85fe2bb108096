"""Functions for JSON pointers (RFC 6901) to the keys of a config."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

__all__ = [
    "dotted_name",
    "get_last_key",
    "get_parent",
    "is_within",
    "join_pointer",
    "remove_keys",
    "split_pointer",
]


def join_pointer(parent: str, key: str | int) -> str:
    """Append a key or a list index to a JSON pointer.

    >>> join_pointer("/engine", "a/b")
    '/engine/a~1b'
    """
    return f"{parent}/{str(key).replace('~', '~0').replace('/', '~1')}"


def split_pointer(pointer: str) -> list[str]:
    """Split a JSON pointer into its unescaped keys, outermost first.

    >>> split_pointer("/engine/a~1b"), split_pointer("")
    (['engine', 'a/b'], [])
    """
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]


def dotted_name(pointer: str) -> str:
    """Convert a JSON pointer to a dotted name for messages.

    >>> dotted_name("/fp16/enabled")
    'fp16.enabled'
    """
    return ".".join(split_pointer(pointer))


def get_last_key(pointer: str) -> str:
    """Return the last key or list index of a JSON pointer, unescaped."""
    return split_pointer(pointer)[-1]


def get_parent(pointer: str) -> str:
    """Return the JSON pointer of the object or array that encloses the value at ``pointer``."""
    return pointer.rpartition("/")[0]


def is_within(pointer: str, others: Iterable[str]) -> bool:
    """Return whether a JSON pointer is in ``others`` or nested inside a pointer in ``others``.

    >>> is_within("/fp16/enabled", ["/fp16"]), is_within("/fp16", ["/fp16/enabled"])
    (True, False)
    """
    return any(pointer == other or pointer.startswith(f"{other}/") for other in others)


def remove_keys(value: Any, pointers: Collection[str], pointer: str = "") -> Any:
    """Return a copy of a JSON value without the keys at the given JSON pointers.

    Args:
        value: JSON value to copy. Keys inside arrays are not removed.
        pointers: JSON pointers of the keys to remove.
        pointer: JSON pointer of ``value`` itself.

    >>> remove_keys({"fp16": {"enabled": 1, "hysteresis": 2}}, {"/fp16/enabled"})
    {'fp16': {'hysteresis': 2}}
    """
    if not isinstance(value, Mapping):
        return value
    return {
        key: remove_keys(below, pointers, join_pointer(pointer, key))
        for key, below in value.items()
        if join_pointer(pointer, key) not in pointers
    }

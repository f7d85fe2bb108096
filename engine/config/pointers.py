"""Functions for JSON pointers (RFC 6901), which identify the keys of a config."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

__all__ = [
    "dotted_name",
    "is_within",
    "key_at",
    "parent_of",
    "pointer_to",
    "split_pointer",
    "without",
]


def pointer_to(parent: str, key: str | int) -> str:
    """Return the JSON pointer of a key or an index inside the value at ``parent``.

    >>> pointer_to("/engine", "a/b")
    '/engine/a~1b'
    """
    return f"{parent}/{str(key).replace('~', '~0').replace('/', '~1')}"


def split_pointer(pointer: str) -> list[str]:
    """Return the keys in a pointer, outermost first.

    >>> split_pointer("/engine/a~1b"), split_pointer("")
    (['engine', 'a/b'], [])
    """
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]


def dotted_name(pointer: str) -> str:
    """Return the dotted name of a key, which is used in messages.

    >>> dotted_name("/fp16/enabled")
    'fp16.enabled'
    """
    return ".".join(split_pointer(pointer))


def key_at(pointer: str) -> str:
    """Return the last key of a pointer."""
    return split_pointer(pointer)[-1]


def parent_of(pointer: str) -> str:
    """Return the pointer of the object that contains the key."""
    return pointer.rpartition("/")[0]


def is_within(pointer: str, others: Iterable[str]) -> bool:
    """Return whether a pointer equals one of the others, or points to a value inside one of them.

    >>> is_within("/fp16/enabled", ["/fp16"]), is_within("/fp16", ["/fp16/enabled"])
    (True, False)
    """
    return any(pointer == other or pointer.startswith(f"{other}/") for other in others)


def without(value: Any, pointers: Collection[str], pointer: str = "") -> Any:
    """Return a copy of a value without the keys at the given pointers.

    Args:
        value: value to copy. Keys of objects inside lists are not removed.
        pointers: JSON pointers of the keys to remove.
        pointer: JSON pointer of the value.

    >>> without({"fp16": {"enabled": 1, "hysteresis": 2}}, {"/fp16/enabled"})
    {'fp16': {'hysteresis': 2}}
    """
    if not isinstance(value, Mapping):
        return value
    return {
        key: without(below, pointers, pointer_to(pointer, key))
        for key, below in value.items()
        if pointer_to(pointer, key) not in pointers
    }

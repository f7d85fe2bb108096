"""JSON pointers (RFC 6901): the address of each key of a config."""

from __future__ import annotations

__all__ = ["pointer_to"]


def pointer_to(parent: str, key: str | int) -> str:
    """Return the JSON pointer of a member.

    >>> pointer_to("/engine", "a/b")
    '/engine/a~1b'
    """
    return f"{parent}/{str(key).replace('~', '~0').replace('/', '~1')}"

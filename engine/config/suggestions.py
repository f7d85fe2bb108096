"""What was probably meant by an unknown key: by spelling, by another tool's name, by place.

None is better than a bad one: a suggestion that is wrong costs more than a second look.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import schemas
from engine.config.pointers import key_at, parent_of
from engine.config.schema import ABSENT, SCHEMA, SECTION, resolve_reference, walk
from engine.errors import Fix
from schedules.core.spelling import edits, nearest

__all__ = ["Suggestion", "suggestion"]


class Suggestion(NamedTuple):
    """The hint for an unknown key, the key beside it that was meant, the repair without a doubt."""

    hint: str
    meant: str = ""
    fix: Fix | None = None


def suggestion(
    pointer: str, key: str, known: Mapping[str, Any], present: Mapping[str, Any]
) -> Suggestion:
    """Return what is to be said about an unknown key.

    Args:
        pointer: the JSON pointer of the object that holds it.
        key: the key.
        known: the properties of that object's schema.
        present: the object.

    >>> known = {"gradient_clipping": {"type": "number"}}
    >>> suggestion("", "gradient_cliping", known, {"gradient_cliping": 1.0}).hint
    'Did you mean `gradient_clipping`?'
    """
    usable = [name for name, schema in known.items() if "x-removed" not in schema]
    absent = [name for name in usable if name not in present]
    meant = _ALIASES.get(pointer, {}).get(key)
    if meant in absent:
        return Suggestion(f"It is `{meant}` here.", meant, Fix(key=meant))
    fitting = [name for name in absent if _fits(present[key], resolve_reference(known[name]))]
    # Of short names two letters may be wrong, where the value points to one all the same.
    near = nearest(key, fitting) or nearest(key, absent) or _only_near(key, fitting)
    if near:
        return Suggestion(f"Did you mean `{near}`?", near)
    if meant and meant.startswith("/"):
        return Suggestion(f"Its place is `{meant}`.")
    places = [place for place in _places().get(key, ()) if place != pointer]
    if 0 < len(places) <= 3:
        where = " or ".join(f"`{place}`" if place else "the top level" for place in places)
        return Suggestion(f"It belongs under {where}.")
    if near := nearest(key, [name for name in usable if name in present]):
        return Suggestion(f"Did you mean `{near}`, which is given already?")
    return Suggestion("")


def _only_near(name: str, known: Collection[str]) -> str | None:
    """Return the one known name that is two edits away and begins or ends alike."""
    near = [
        other
        for other in known
        if edits(name.lower(), other, 2) <= 2
        and (other[:1] == name[:1].lower() or other[-1:] == name[-1:].lower())
    ]
    return near[0] if len(near) == 1 and len(name) > 1 else None


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a value is of a type that a schema takes, in JSON's terms."""
    wanted = schema.get("type", [])
    names = [wanted] if isinstance(wanted, str) else wanted
    return any(isinstance(value, _TYPES[name]) for name in names) and not (
        isinstance(value, bool) and "boolean" not in names
    )


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "array": list,
    "boolean": bool,
    "integer": (int, float),
    "null": type(None),
    "number": (int, float),
    "object": dict,
    "string": str,
}
_ALIASES: Mapping[str, Mapping[str, str]] = schemas.read("aliases.json")


@functools.cache
def _places() -> dict[str, tuple[str, ...]]:
    """Return the sections in which each key is known, except optimizers' and schedules' params."""
    places: dict[str, tuple[str, ...]] = {}
    for member in walk({}, schemas.read(SCHEMA), fill=_unless_old):
        key = key_at(member.pointer)
        places[key] = (*places.get(key, ()), parent_of(member.pointer))
    return places


def _unless_old(schema: Mapping[str, Any]) -> Any:
    return ABSENT if "x-removed" in schema or schema.get("deprecated") else SECTION

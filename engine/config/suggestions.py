"""What was probably meant by an unknown key: by spelling, by another tool's name, by place.

None is better than a bad one: a suggestion that is wrong costs more than a second look.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import schemas
from engine.config.problems import Fix, pointer_to
from engine.config.sections import SCHEMA, resolve_reference

__all__ = ["Suggestion", "edits", "nearest", "suggestion"]


class Suggestion(NamedTuple):
    """The hint for an unknown key, the key beside it that was meant, the repair without a doubt."""

    hint: str
    meant: str = ""
    fix: Fix | None = None


def suggestion(
    pointer: str, key: str, known: Mapping[str, Any], present: Collection[str]
) -> Suggestion:
    """Return what is to be said about an unknown key.

    Args:
        pointer: the JSON pointer of the object that holds it.
        key: the key.
        known: the properties of that object's schema.
        present: the keys that the object has.

    >>> suggestion("", "gradient_cliping", {"gradient_clipping": {}}, {"gradient_cliping"}).hint
    'Did you mean `gradient_clipping`?'
    """
    usable = [name for name, schema in known.items() if "x-removed" not in schema]
    absent = [name for name in usable if name not in present]
    meant = _ALIASES.get(pointer, {}).get(key)
    if meant in absent:
        return Suggestion(f"It is `{meant}` here.", meant, Fix(key=meant))
    near = nearest(key, absent)
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


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that is nearest in spelling, or None where none is near.

    >>> nearest("stge", ["stage", "type"])
    'stage'
    """
    folded = {other.lower(): other for other in known}
    low = name.lower()
    if low in folded:
        return folded[low]
    most = 1 if len(low) <= 4 else 2 if len(low) <= 9 else 3
    found = [(edits(low, other, most), other) for other in folded]
    near = [(count, -_alike(low, other), other) for count, other in found if count <= most]
    if near:
        return folded[min(near)[2]]
    close = difflib.get_close_matches(low, folded, n=1, cutoff=0.82)
    return folded[close[0]] if close else None


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def edits(one: str, other: str, most: int) -> int:
    """Return how many letters to insert, remove, replace or exchange with their neighbour.

    Counting stops beyond ``most``.

    >>> edits("wramup", "warmup", 2), edits("warmup", "cooldown", 2)
    (1, 3)
    """
    if abs(len(one) - len(other)) > most:
        return most + 1
    before: list[int] = []
    last = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        line = [row]
        for column, wanted in enumerate(other, 1):
            count = min(last[column] + 1, line[-1] + 1, last[column - 1] + (letter != wanted))
            swapped = column > 1 and row > 1 and letter == other[column - 2]
            if swapped and one[row - 2] == wanted:
                count = min(count, before[column - 2] + 1)
            line.append(count)
        if min(line) > most:
            return most + 1
        before, last = last, line
    return last[-1]


_ALIASES: Mapping[str, Mapping[str, str]] = schemas.read("aliases.json")


@functools.cache
def _places() -> dict[str, tuple[str, ...]]:
    """Return the places at which each key is known, but for optimizers' and schedules' params."""
    places: dict[str, tuple[str, ...]] = {}
    for key, pointer in _keys(schemas.read(SCHEMA), ""):
        places[key] = (*places.get(key, ()), pointer)
    return places


def _keys(schema: Mapping[str, Any], pointer: str) -> Iterator[tuple[str, str]]:
    for key, below in schema.get("properties", {}).items():
        resolved = resolve_reference(below)
        if "x-removed" not in resolved and not resolved.get("deprecated"):
            yield key, pointer
            yield from _keys(resolved, pointer_to(pointer, key))

"""Suggest how to correct an unknown key in a config.

A suggestion names a valid key with a similar name, the equivalent of a key from another tool, or
the sections in which the unknown key is valid.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import schemas
from engine.config.pointers import get_last_key, get_parent
from engine.config.schema import (
    ABSENT,
    OPTIMIZERS,
    SCHEMA,
    SECTION,
    optimizer_name,
    resolve_reference,
    walk,
)
from engine.errors import Fix
from schedules import SCHEDULES
from schedules.core.fields import read_fields
from schedules.core.spelling import edit_distance, find_abbreviation, find_nearest, suggest_fraction

__all__ = ["Suggestion", "suggest_key", "suggest_optimizer"]

_IMPLEMENTATIONS = (
    "deepspeed",
    "anyprecision",
    "paged",
    "fused",
    "torch",
    "apex",
    "cpu",
    "hf",
    "npu",
    "xla",
    "bnb",
    "32bit",
    "8bit",
)
"""Words that other libraries add to optimizer names to specify an implementation or a device."""


class Suggestion(NamedTuple):
    """A suggestion for an unknown key.

    ``hint`` is the sentence to show to the user, or an empty string. ``meant`` is the valid key
    that replaces the unknown key in the same section, or an empty string if none is known. ``fix``
    renames the unknown key to ``meant``. The user must confirm the fix unless the unknown key is
    an alias of ``meant``.
    """

    hint: str
    meant: str = ""
    fix: Fix | None = None


def suggest_key(
    pointer: str, key: str, known: Mapping[str, Any], present: Mapping[str, Any]
) -> Suggestion:
    """Suggest a valid key to use instead of an unknown key.

    Args:
        pointer: JSON pointer of the object that contains the unknown key.
        key: unknown key.
        known: JSON schema of each key that is valid in the object.
        present: object that contains the unknown key.

    >>> known = {"gradient_clipping": {"type": "number"}}
    >>> suggest_key("", "gradient_cliping", known, {"gradient_cliping": 1.0}).hint
    'Did you mean `gradient_clipping`?'
    """
    usable = [name for name, schema in known.items() if "x-removed" not in schema]
    absent = [name for name in usable if name not in present]
    meant = _ALIASES.get(pointer, {}).get(key)
    if meant in absent:
        return Suggestion(f"Use `{meant}` instead.", meant, Fix(key=meant))
    if meant and meant.startswith("/"):
        return Suggestion(f"Use `{meant}` instead.")
    if hint := suggest_fraction(key, present[key], absent):
        return Suggestion(hint)
    if key in _find_params(pointer, present):
        return Suggestion(f"Move it to `{pointer}/params`.")
    fitting = [
        name for name in absent if _accepts_type(present[key], resolve_reference(known[name]))
    ]
    # A short name may differ in two letters if only one similar key accepts the value's type.
    near = (
        find_nearest(key, fitting)
        or find_nearest(key, absent)
        or _find_unique_match(key, fitting)
        or find_abbreviation(key, fitting)
    )
    if near:
        return Suggestion(f"Did you mean `{near}`?", near, Fix(key=near, is_certain=False))
    sections = [each for each in _map_keys_to_sections().get(key, ()) if each != pointer]
    if 0 < len(sections) <= 3:
        where = " or ".join(f"`{each}`" if each else "the top level" for each in sections)
        return Suggestion(f"Move it to {where}.")
    if near := find_nearest(key, [name for name in usable if name in present]):
        return Suggestion(f"Remove the key if you meant `{near}`, which is already set.")
    return Suggestion("")


def suggest_optimizer(name: str) -> str | None:
    """Return the known optimizer that an unknown name probably refers to.

    Return None if no known optimizer has a similar name.

    >>> suggest_optimizer("DeepSpeedCPUAdam"), suggest_optimizer("adamw_torch_fused")
    ('Adam', 'AdamW')
    >>> suggest_optimizer("SGDD"), suggest_optimizer("Shampoo")
    ('SGD', None)
    """
    bare = name.lower()
    for part in _IMPLEMENTATIONS:
        bare = bare.replace(part, "")
    return optimizer_name(bare.strip("_-")) or find_nearest(name, OPTIMIZERS)


def _find_params(pointer: str, block: Mapping[str, Any]) -> Collection[str]:
    """Return the valid parameter names for an ``optimizer`` or ``scheduler`` block."""
    name = block.get("type")
    if not isinstance(name, str):
        return ()
    if pointer == "/optimizer":
        known = OPTIMIZERS.get(optimizer_name(name) or "", {})
        return tuple(known.get("properties", ()))
    return read_fields(SCHEDULES[name]) if pointer == "/scheduler" and name in SCHEDULES else ()


def _find_unique_match(name: str, known: Collection[str]) -> str | None:
    """Return the only known name similar to ``name``, or None if there are none or several.

    Two names are similar if their edit distance is at most 2 and they have the same first or last
    letter.
    """
    near = [
        other
        for other in known
        if edit_distance(name.lower(), other, 2) <= 2
        and (other[:1] == name[:1].lower() or other[-1:] == name[-1:].lower())
    ]
    return near[0] if len(near) == 1 and len(name) > 1 else None


def _accepts_type(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a schema accepts the JSON type of a value."""
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
def _map_keys_to_sections() -> dict[str, tuple[str, ...]]:
    """Map each key name to the JSON pointers of the sections in which the key is valid.

    The ``params`` of optimizers and schedules are not included.
    """
    sections: dict[str, tuple[str, ...]] = {}
    for member in walk({}, schemas.read(SCHEMA), fill=_skip_old_keys):
        key = get_last_key(member.pointer)
        sections[key] = (*sections.get(key, ()), get_parent(member.pointer))
    return sections


def _skip_old_keys(schema: Mapping[str, Any]) -> Any:
    return ABSENT if "x-removed" in schema or schema.get("deprecated") else SECTION

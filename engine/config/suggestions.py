"""Suggest how to correct an unknown key in a config.

A suggestion names a valid key with a similar name, the equivalent of a key from another tool, or
the sections in which the unknown key is valid.
"""

from __future__ import annotations

import functools
import json
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
from schedules.core.registry import suggest as suggest_schedule
from schedules.core.spelling import edit_distance, find_abbreviation, find_nearest, suggest_fraction

__all__ = ["Suggestion", "suggest_key", "suggest_optimizer", "wrap_in_section"]

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
    renames the unknown key to ``meant``, and is None if ``meant`` does not accept the value. The
    user must confirm the fix unless the unknown key is an alias of ``meant``.
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
    value = present[key]
    if found := _find_named_section(value, known, absent):
        return found
    meant = _ALIASES.get(pointer, {}).get(key, "")
    if meant in absent:
        return _suggest_alias(meant, value, resolve_reference(known[meant]))
    if meant.startswith("/"):
        return Suggestion(f"Use `{meant}` instead.")
    if " " in meant:  # a sentence, because the value must change, too
        return Suggestion(meant)
    if hint := _suggest_nesting(pointer, key) or suggest_fraction(key, value, absent):
        return Suggestion(hint)
    if key in _find_params(pointer, present):
        return Suggestion(f"Move it to `{pointer}/params`.")
    fitting = [name for name in absent if _accepts_type(value, resolve_reference(known[name]))]
    # A short name may differ in two letters if only one similar key accepts the value's type.
    near = (
        find_nearest(key, fitting)
        or find_nearest(key, absent)
        or _find_unique_match(key, fitting)
        or find_abbreviation(key, fitting)
    )
    if near:
        fix = Fix(key=near, is_certain=False) if near in fitting else None
        return Suggestion(f"Did you mean `{near}`?", near, fix)
    sections = [each for each in _map_keys_to_sections().get(key, ()) if each != pointer]
    if 0 < len(sections) <= 3:
        where = " or ".join(f"`{each}`" if each else "the top level" for each in sections)
        return Suggestion(f"Move it to {where}.")
    if near := find_nearest(key, [name for name in usable if name in present]):
        return Suggestion(f"Remove the key if you meant `{near}`, which is already set.")
    return Suggestion("")


def wrap_in_section(value: object, schema: Mapping[str, Any]) -> str:
    """Return a section, as JSON, that sets the key that a single value was probably meant for.

    A boolean is the value of ``enabled``, a number that of ``stage``, and the name of an optimizer
    or a schedule that of ``type``. Return an empty string if the section lacks this key.

    >>> wrap_in_section(2, {"properties": {"stage": {"type": "integer"}}})
    '{"stage": 2}'
    """
    key = {bool: "enabled", int: "stage", str: "type"}.get(type(value), "")
    of_key = schema.get("properties", {}).get(key)
    meant: Any = value
    if key == "type":
        suggest = suggest_schedule if schema.get("title") == "scheduler" else suggest_optimizer
        meant = suggest(str(value))
    if of_key is None or meant is None or not _is_in_range(meant, of_key):
        return ""
    return json.dumps({key: meant})


def _is_in_range(value: Any, schema: Mapping[str, Any]) -> bool:
    return "maximum" not in schema or schema["minimum"] <= value <= schema["maximum"]


def suggest_optimizer(name: str) -> str | None:
    """Return the known optimizer that an unknown name probably refers to.

    Return None if no known optimizer has a similar name.

    >>> suggest_optimizer("DeepSpeedCPUAdam"), suggest_optimizer("adamw_torch_fused")
    ('Adam', 'AdamW')
    >>> suggest_optimizer("SGDD"), suggest_optimizer("Shampoo")
    ('SGD', None)
    """
    name = name.rpartition(".")[2]  # without the module in "torch.optim.AdamW"
    bare = name.lower()
    for part in _IMPLEMENTATIONS:
        bare = bare.replace(part, "")
    return optimizer_name(bare.strip("_-")) or find_nearest(name, OPTIMIZERS)


def _suggest_alias(meant: str, value: object, schema: Mapping[str, Any]) -> Suggestion:
    """Suggest the equivalent of a key from another tool.

    The suggestion contains a fix only if the value of the key need not change.
    """
    if _accepts_type(value, schema):
        return Suggestion(f"Use `{meant}` instead.", meant, Fix(key=meant))
    section = wrap_in_section(value, schema)
    written = f'"{meant}": {section}' if section else f"`{meant}`"
    return Suggestion(f"Use {written} instead.", meant)


def _find_named_section(
    value: object, known: Mapping[str, Any], absent: Collection[str]
) -> Suggestion | None:
    """Suggest the section that a value names, as in ``"mixed_precision": "bf16"``."""
    if not isinstance(value, str) or value not in absent:
        return None
    section = wrap_in_section(True, resolve_reference(known[value]))
    return Suggestion(f'Use "{value}": {section} instead.', value) if section else None


def _suggest_nesting(pointer: str, key: str) -> str:
    """Return a hint if an unknown key is a path, such as "fp16.enabled"; otherwise ""."""
    parts = key.replace("/", ".").split(".")
    *sections, name = parts
    wanted = pointer + "".join(f"/{part}" for part in sections)
    if not sections or wanted not in _map_keys_to_sections().get(name, ()):
        return ""
    return f"Move it to `{wanted}`, as `{name}`."


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

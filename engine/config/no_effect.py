"""Look up in ``schemas/no_effect.json`` which config keys do not affect the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import schemas
from engine.config.pointers import get_parent, join_pointer
from engine.config.schema import Member, resolve_reference

__all__ = ["find_reason_for_no_effect"]

_TABLE: Mapping[str, Mapping[str, Mapping[str, Any]]] = schemas.read("no_effect.json")


def find_reason_for_no_effect(member: Member, backend: str, stage: int | None = None) -> str | None:
    """Return the reason why a key or section cannot affect the results, or None if it can.

    Args:
        member: key or section of a config, with its value.
        backend: "torch" or "deepspeed".
        stage: ZeRO stage; None to return a reason only if it applies to every stage.

    >>> print(find_reason_for_no_effect(Member("/gradient_allreduce_op", "sum", {}), "torch"))
    None
    >>> find_reason_for_no_effect(Member("/log_level", "info", {}), "torch")
    "The key sets the level of DeepSpeed's logger, which the PyTorch backend does not use."
    """
    pointer = _find_current_pointer(member)
    row = _TABLE[backend].get(pointer) or _TABLE["all"].get(pointer)
    if row is None or ("stages" in row and stage not in row["stages"]):
        return None
    reason: str = row["reason"]
    return reason if _is_listed(member, row.get("values")) else None


def _find_current_pointer(member: Member) -> str:
    """Return the JSON pointer of a key, with aliases and deprecated names replaced."""
    alias = member.schema.get("x-alias-of")
    pointer = join_pointer(get_parent(member.pointer), alias) if alias else member.pointer
    return pointer.replace("/bfloat16/", "/bf16/", 1)


def _is_listed(member: Member, values: Any) -> bool:
    """Return whether a key or section has a value that does not affect the results.

    Args:
        member: key or section of a config, with its value.
        values: for a key, a list of values that do not affect the results. For a section, a dict
            that maps keys of the section to such lists, or nested sections to such dicts; the
            section does not affect the results if the value of each of these keys is in its list.
            If None, no value affects the results.
    """
    if values is None:
        return True
    if isinstance(values, Mapping):
        return _are_listed(member.value, member.schema, values)
    return _contains(values, member.value)


def _are_listed(section: Any, schema: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Return whether the keys of a section, and of its own sections, have values in the lists."""
    given = section if isinstance(section, Mapping) else {}
    for key, listed in values.items():
        of_key = resolve_reference(schema.get("properties", {}).get(key, {}))
        if isinstance(listed, Mapping):
            if not _are_listed(given.get(key), of_key, listed):
                return False
        elif not _contains(listed, given.get(key, of_key.get("default", listed[0]))):
            return False
    return True


def _contains(values: list[Any], value: Any) -> bool:
    return any(value == each and (value is True) == (each is True) for each in values)

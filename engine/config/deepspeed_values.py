"""Convert values as DeepSpeed reads them: 0 and 1 as booleans, and null as an absent key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import schemas
from engine.config.batch_sizes import BATCH_KEYS
from engine.config.parser import Document
from engine.config.pointers import dotted_name, join_pointer, remove_keys
from engine.config.schema import SCHEMA, walk
from engine.errors import Fix, Problem
from schedules.core.descriptions import read_index

__all__ = ["convert_numbers_to_booleans", "drop_nulls"]

_OWN_SECTION = "/engine/"
_OWN_KEYS = {"/optimizer/no_decay"}
_PARAMS = "/scheduler/params/"
_OWN_PARAMS = {"/scheduler/params/relative"}
"""Parameters that onecycle adds to DeepSpeed's schedules."""

_ABSENT_IF_NULL = {
    **{f"/{key}": f"/{key}" for key in (*BATCH_KEYS, "bf16", "dataloader_drop_last")},
    "/optimizer/params": "/optimizer/params",
    "/scheduler/type": "/scheduler",
}
"""JSON pointers of keys that may be null in DeepSpeed, and of the keys that are then absent."""


def drop_nulls(document: Document) -> tuple[Document, list[Problem]]:
    """Remove the keys that are null if DeepSpeed treats them as absent.

    Args:
        document: parsed config; it is not modified.

    Returns:
        A pair ``(document, problems)``: the document without these keys, and one problem of
        severity "note" per key.
    """
    nulls = {
        _ABSENT_IF_NULL[member.pointer]: member.pointer
        for member in walk(document.value, schemas.read(SCHEMA))
        if member.value is None and member.pointer in _ABSENT_IF_NULL
    }
    problems = [
        document.build_problem(
            "null-as-absent",
            pointer,
            f"`{dotted_name(pointer)}` is null, so DeepSpeed treats `{dotted_name(absent)}` as "
            "absent.",
            f"Remove `{dotted_name(absent)}`.",
            severity="note",
        )
        for absent, pointer in nulls.items()
    ]
    return replace(document, value=remove_keys(document.value, nulls)), problems


def convert_numbers_to_booleans(document: Document) -> tuple[Document, list[Problem]]:
    """Replace 0 with false and 1 with true in the values of DeepSpeed's boolean keys.

    Args:
        document: parsed config; it is not modified.

    Returns:
        A pair ``(document, problems)``: the document with the replacements, and one problem of
        severity "note" per replacement.
    """
    converted = {
        member.pointer: bool(member.value)
        for member in walk(document.value, schemas.read(SCHEMA))
        if _is_boolean(member.schema)
        and not isinstance(member.value, bool)
        and member.value in (0, 1)
        and _is_read_by_deepspeed(member.pointer, document.value)
    }
    if not converted:
        return document, []
    problems = []
    for pointer, value in converted.items():
        written = "true" if value else "false"
        message = f"`{dotted_name(pointer)}` is {int(value)}, which DeepSpeed reads as {written}."
        problems.append(
            document.build_problem(
                "number-as-boolean",
                pointer,
                message,
                f"Write {written}.",
                severity="note",
                fix=Fix(value=value),
            )
        )
    return replace(document, value=_replace_values(document.value, converted)), problems


def _is_read_by_deepspeed(pointer: str, config: Mapping[str, Any]) -> bool:
    if not pointer.startswith(_PARAMS):
        return not pointer.startswith(_OWN_SECTION) and pointer not in _OWN_KEYS
    schedule = read_index().get(str(config["scheduler"].get("type")), {})
    return schedule.get("family") == "families.deepspeed" and pointer not in _OWN_PARAMS


def _is_boolean(schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type", ())
    names = {kinds} if isinstance(kinds, str) else set(kinds)
    return "boolean" in names and not names & {"integer", "number", "object"}


def _replace_values(value: Any, new: Mapping[str, Any], pointer: str = "") -> Any:
    if pointer in new:
        return new[pointer]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _replace_values(below, new, join_pointer(pointer, key)) for key, below in value.items()
    }

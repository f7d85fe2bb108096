"""Build a self-contained draft-07 JSON Schema for configs, for use in editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import schemas
from engine.config.pointers import get_last_key, get_parent
from engine.config.schema import OPTIMIZERS, SCHEMA, SECTION, schedule_schema, walk
from schedules import SCHEDULES

__all__ = ["editor_schema"]

_DRAFT = "http://json-schema.org/draft-07/schema#"


def editor_schema() -> dict[str, Any]:
    """Build the JSON Schema that editors use for completion, tooltips and error highlighting.

    A config refers to this schema in its ``$schema`` key. In the optimizer and scheduler blocks,
    the value of ``type`` determines which keys are valid in ``params``. Only `onecycle validate`
    checks other dependencies between values.
    """
    schema = _inline_references(schemas.read(SCHEMA))
    schema["$schema"] = _DRAFT
    usable = {name: params for name, params in OPTIMIZERS.items() if "x-removed" not in params}
    properties = schema["properties"]
    properties["optimizer"] |= _branch_on_type(usable, any_case=True)
    custom = {"pattern": ":"}  # a custom class or function, written as module:attribute
    by_schedule = {name: schedule_schema(cls) for name, cls in SCHEDULES.items()}
    properties["scheduler"] |= _branch_on_type(by_schedule, any_case=False)
    for block, names in ((properties["optimizer"], usable), (properties["scheduler"], SCHEDULES)):
        of_type = block["properties"]["type"]
        any_case = [{"pattern": _build_case_insensitive_pattern(name)} for name in names]
        patterns = any_case if names is usable else []
        of_type["anyOf"] = [{"enum": list(names)}, *patterns, custom]
    return schema


def _inline_references(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a schema with each ``$ref`` replaced by the schema that it refers to."""
    inlined = {"": _copy_for_editors(schema)}
    for member in walk({}, schema, fill=lambda _: SECTION):
        inlined[member.pointer] = _copy_for_editors(member.schema)
        around = inlined[get_parent(member.pointer)]["properties"]
        around[get_last_key(member.pointer)] = inlined[member.pointer]
    return inlined[""]


def _copy_for_editors(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a schema without ``$ref``, ``$schema`` or the entries of ``properties``.

    A ``deprecationMessage`` is added to the schema of a deprecated or removed key.
    """
    copy = {key: value for key, value in schema.items() if key not in {"$ref", "$schema"}}
    if "properties" in copy:
        copy["properties"] = {}
    if copy.get("deprecated") or "x-removed" in copy:
        copy["deprecationMessage"] = copy.get("x-instead", "deprecated")
    return copy


def _branch_on_type(of_types: Mapping[str, Mapping[str, Any]], *, any_case: bool) -> dict[str, Any]:
    """Build a schema that validates ``params`` differently for each value of ``type``.

    Args:
        of_types: dict that maps each type to the schema of its ``params``.
        any_case: whether types are matched case-insensitively.

    Returns:
        A schema with one if/then branch per type.
    """
    branches = []
    for name, schema in of_types.items():
        of_type = (
            {"pattern": _build_case_insensitive_pattern(name)} if any_case else {"const": name}
        )
        params = _inline_references(schema)
        then: dict[str, Any] = {"properties": {"params": params}}
        if params.get("required"):
            then["required"] = ["params"]
        given = {"properties": {"type": of_type}, "required": ["type"]}
        branches.append({"if": given, "then": then})
    return {"allOf": branches}


def _build_case_insensitive_pattern(name: str) -> str:
    letters = (f"[{c.upper()}{c.lower()}]" if c.isalpha() else c for c in name)
    return f"^{''.join(letters)}$"

"""One JSON schema of a whole config, for editors: draft-07, and nothing outside of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import schemas
from engine.config.pointers import key_at, parent_of
from engine.config.schema import OPTIMIZERS, SCHEMA, SECTION, schedule_schema, walk
from schedules import SCHEDULES

__all__ = ["editor_schema"]

_DRAFT = "http://json-schema.org/draft-07/schema#"


def editor_schema() -> dict[str, Any]:
    """Return the schema that gives completion, hover and squiggles through ``$schema``.

    It gives the verdict of the first phase of `check`: what each value must be by itself. The
    parameters of optimizers and schedules follow their ``type``.
    """
    schema = _inlined(schemas.read(SCHEMA))
    schema["$schema"] = _DRAFT
    usable = {name: of for name, of in OPTIMIZERS.items() if "x-removed" not in of}
    properties = schema["properties"]
    properties["optimizer"] |= _by_type(usable, any_case=True)
    own = {"pattern": ":"}  # a schedule of one's own, as module:attribute
    of_schedules = {name: schedule_schema(cls) for name, cls in SCHEDULES.items()}
    properties["scheduler"] |= _by_type(of_schedules, any_case=False)
    for block, names in ((properties["optimizer"], usable), (properties["scheduler"], SCHEDULES)):
        of_type = block["properties"]["type"]
        spelt = [{"pattern": _in_any_case(name)} for name in names] if names is usable else [own]
        of_type["anyOf"] = [{"enum": list(names)}, *spelt]
    return schema


def _inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema with the files that it refers to in it."""
    inlined = {"": _for_editors(schema)}
    for member in walk({}, schema, fill=lambda _: SECTION):
        inlined[member.pointer] = _for_editors(member.schema)
        around = inlined[parent_of(member.pointer)]["properties"]
        around[key_at(member.pointer)] = inlined[member.pointer]
    return inlined[""]


def _for_editors(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a schema with what editors show of a deprecated key."""
    copy = {key: value for key, value in schema.items() if key not in {"$ref", "$schema"}}
    if "properties" in copy:
        copy["properties"] = {}
    if copy.get("deprecated") or "x-removed" in copy:
        copy["deprecationMessage"] = copy.get("x-instead", "deprecated")
    return copy


def _by_type(of_types: Mapping[str, Mapping[str, Any]], *, any_case: bool) -> dict[str, Any]:
    """Return what chooses the schema of ``params`` by ``type``: a branch a type, never a oneOf."""
    branches = []
    for name, schema in of_types.items():
        of_type = {"pattern": _in_any_case(name)} if any_case else {"const": name}
        params = _inlined(schema)
        then: dict[str, Any] = {"properties": {"params": params}}
        if params.get("required"):
            then["required"] = ["params"]
        given = {"properties": {"type": of_type}, "required": ["type"]}
        branches.append({"if": given, "then": then})
    return {"allOf": branches}


def _in_any_case(name: str) -> str:
    letters = (f"[{c.upper()}{c.lower()}]" if c.isalpha() else c for c in name)
    return f"^{''.join(letters)}$"

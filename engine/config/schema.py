"""Which JSON schema holds for which part of a config, and what its annotations say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import schemas
from engine.config.pointers import pointer_to
from schedules import SCHEDULES, Schedule
from schedules.core.json_schema import json_schema_of

__all__ = [
    "OPTIMIZERS",
    "PARKED",
    "SCHEMA",
    "Member",
    "is_parked",
    "optimizer_members",
    "optimizer_name",
    "optimizer_schema",
    "resolve_reference",
    "schedule_schema",
    "walk",
    "with_defaults",
]

SCHEMA = "ds_config.schema.json"
PARKED = ("x-", "//", "_")
"""How a key begins that nobody reads: a note, or a setting put aside."""
OPTIMIZERS: Mapping[str, dict[str, Any]] = schemas.read("optimizers.json")["$defs"]


def is_parked(key: str) -> bool:
    """Return whether a key is parked.

    >>> is_parked("_comment"), is_parked("fp16")
    (True, False)
    """
    return key.startswith(PARKED)


def optimizer_name(name: str) -> str | None:
    """Return an optimizer's proper name from its name in any case; None for an unknown one."""
    return {known.lower(): known for known in OPTIMIZERS}.get(name.lower())


def optimizer_schema(name: str) -> dict[str, Any]:
    """Return the schema of an optimizer's ``params``."""
    return OPTIMIZERS[name]


def schedule_schema(cls: type[Schedule[Any]]) -> dict[str, Any]:
    """Return the schema of a schedule's ``params``, generated now for one of the user's own."""
    if SCHEDULES.get(cls.type_name) is cls:
        with contextlib.suppress(FileNotFoundError):
            return schemas.read(f"schedulers/{cls.type_name}.json")
    return json_schema_of(cls)


def resolve_reference(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema itself, or the file that it refers to, with what it adds."""
    reference = schema.get("$ref")
    return {**schemas.read(reference), **schema} if reference else schema


class Member(NamedTuple):
    """A key that a schema knows, as a config has it."""

    pointer: str
    value: Any
    schema: Mapping[str, Any]


def walk(value: Any, schema: Mapping[str, Any], pointer: str = "") -> Iterator[Member]:
    """Yield every key that is known, at every depth.

    >>> [member.pointer for member in walk({"fp16": {"enabled": True}}, schemas.read(SCHEMA))]
    ['/fp16', '/fp16/enabled']
    """
    if not isinstance(value, dict):
        return
    properties = schema.get("properties", {})
    for key, below in value.items():
        if key in properties:
            resolved = resolve_reference(properties[key])
            member = Member(pointer_to(pointer, key), below, resolved)
            yield member
            yield from walk(below, resolved, member.pointer)


def optimizer_members(block: Mapping[str, Any]) -> Iterator[Member]:
    """Yield an optimizer's type and params, if it is known; its schema is that of both.

    >>> [member.pointer for member in optimizer_members({"type": "Lamb", "params": {"lr": 0.1}})]
    ['/optimizer/type', '/optimizer/params/lr']
    """
    name = optimizer_name(block["type"])
    if name is not None:
        schema = optimizer_schema(name)
        yield Member("/optimizer/type", name, schema)
        yield from walk(block.get("params", {}), schema, "/optimizer/params")


def with_defaults(value: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with the defaults of its schema in place of absent keys, parked keys gone.

    Sections that are absent altogether are filled in where all their keys have defaults.

    >>> with_defaults({"enabled": True, "x-note": 1}, schemas.read("sections/bf16.json"))["enabled"]
    True
    """
    filled = {}
    for key, schema_of_key in schema["properties"].items():
        below = resolve_reference(schema_of_key)
        if key in value and "properties" in below and isinstance(value[key], Mapping):
            filled[key] = with_defaults(value[key], below)
        elif key in value:
            filled[key] = value[key]
        elif below.get("x-backend") == "deepspeed" or below.get("deprecated"):
            continue  # what this backend does not read needs no default here
        elif "default" in below:
            filled[key] = below["default"]
        elif "properties" in below and "required" not in below:
            filled[key] = with_defaults({}, below)
    return filled

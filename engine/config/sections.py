"""Which JSON schema holds for which part of a config, and the defaults that it states."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import schemas
from schedules import SCHEDULES, Schedule
from schedules.json_schema import json_schema_of

__all__ = [
    "OPTIMIZERS",
    "SCHEMA",
    "optimizer_name",
    "optimizer_schema",
    "schedule_schema",
    "with_defaults",
]

SCHEMA = "ds_config.schema.json"
OPTIMIZERS: Mapping[str, dict[str, Any]] = schemas.read("optimizers.json")["$defs"]


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


def with_defaults(value: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with the defaults of its schema in place of absent keys, parked keys gone.

    Sections that are absent altogether are filled in where all their keys have defaults.

    >>> with_defaults({"enabled": True, "x-note": 1}, schemas.read("sections/bf16.json"))
    {'enabled': True}
    """
    filled = {}
    for key, schema_of_key in schema["properties"].items():
        reference = schema_of_key.get("$ref")
        below = schemas.read(reference) if reference else schema_of_key
        if key in value and "properties" in below and isinstance(value[key], Mapping):
            filled[key] = with_defaults(value[key], below)
        elif key in value:
            filled[key] = value[key]
        elif "default" in below:
            filled[key] = below["default"]
        elif "properties" in below and "required" not in below:
            filled[key] = with_defaults({}, below)
    return filled

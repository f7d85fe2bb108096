"""Generate the JSON schema of a schedule's parameters from its dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from schedules.core.descriptions import read_descriptions
from schedules.core.fields import Field, read_fields
from schedules.core.schedule import Schedule

__all__ = ["build_json_schema"]


def build_json_schema(schedule: type[Schedule[Any]]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a schedule's ``params``.

    >>> from schedules import WarmupDecayLR
    >>> build_json_schema(WarmupDecayLR)["required"]
    ['total_num_steps']
    """
    descriptions = read_descriptions(schedule)
    fields = read_fields(schedule)
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": schedule.type_name,
        "description": (inspect.getdoc(schedule) or "").partition("\n\n>>>")[0],
        "type": "object",
        "properties": {
            name: _build_property(field, descriptions[name]) for name, field in fields.items()
        },
        "required": [name for name, field in fields.items() if field.required],
        "additionalProperties": False,
    }
    if not schema["required"]:
        del schema["required"]
    return schema


def _build_property(field: Field, description: str) -> dict[str, Any]:
    default = {} if field.required else {"default": field.default}
    auto = _add_auto(field.schema, field.auto_integrations) if field.auto_integrations else {}
    return {"description": field.complete(description), **field.schema, **default, **auto}


def _add_auto(schema: Mapping[str, Any], auto_integrations: str) -> dict[str, Any]:
    """Return the JSON Schema keywords that make a field also accept "auto".

    Args:
        schema: JSON schema of the field.
        auto_integrations: comma-separated names of the integrations that replace "auto" with a
            value.
    """
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    pattern = f"^auto$|{schema['pattern']}" if "pattern" in schema else "^auto$"
    names = types if "string" in types else [*types, "string"]
    return {"type": names, "pattern": pattern, "x-auto": auto_integrations}

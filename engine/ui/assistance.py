"""Completion and hover help for the config editor, based on the JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import schemas
from engine.config.param_groups import build_group_schema
from engine.config.schema import (
    OPTIMIZERS,
    SCHEMA,
    get_member_schema,
    optimizer_name,
    resolve_reference,
    schedule_schema,
)
from engine.config.wording import quote_value
from engine.display.catalog import get_summary
from engine.ui.cursor import Cursor, Frame, from_utf16, locate, to_utf16
from schedules import SCHEDULES
from schedules.core.fields import describe_schema
from schedules.core.registry import find

__all__ = ["complete", "describe"]

_PARAM_GROUPS = "param_groups"
_MANY = 10
"""Completion lists an integer key's valid values only if their maximum is below this number."""


def complete(text: str, offset: int) -> dict[str, Any]:
    """Return the completions at the cursor: keys or values.

    Args:
        text: text in the editor.
        offset: position of the cursor, in UTF-16 code units.

    Returns:
        A dict with the range to replace (``from`` and ``to``) and the ``options``. Each option
        has a label, the text to insert, a short note and help.
    """
    cursor = locate(text, from_utf16(text, offset))
    options = []
    if cursor.role == "key":
        options = list(_list_keys(cursor, text))
    elif cursor.role == "value":
        options = list(_list_values(cursor))
    start, end = to_utf16(text, cursor.start), to_utf16(text, cursor.end)
    return {"from": start, "to": end, "options": options}


def describe(text: str, offset: int) -> dict[str, Any]:
    """Return help for the key or the value under the mouse pointer.

    Args:
        text: text in the editor.
        offset: position in the text, in UTF-16 code units.

    Returns:
        A dict with the range of the key or value (``from`` and ``to``), its ``title``, and
        ``lines``, the paragraphs of the help. If there is no help, ``lines`` is empty.
    """
    cursor = locate(text, from_utf16(text, offset))
    start, end = to_utf16(text, cursor.start), to_utf16(text, cursor.end)
    found: dict[str, Any] = {"from": start, "to": end, "title": "", "lines": []}
    if not cursor.text or not cursor.role:
        return found
    schema = _find_schema(cursor, cursor.key)
    if schema:
        found["title"] = ".".join([*cursor.path, cursor.key])
        found["lines"] = list(_describe_key(cursor, schema))
    return found


def _list_keys(cursor: Cursor, text: str) -> Iterator[dict[str, Any]]:
    given = set(cursor.frames[-1].keys) - {cursor.key}
    rest = text[cursor.end :].lstrip()
    for key, each in _find_object_schema(cursor).get("properties", {}).items():
        schema = resolve_reference(each)
        if key in given or schema.get("deprecated") or {"x-alias-of", "x-removed"} & schema.keys():
            continue
        quoted = json.dumps(key)
        insert = quoted if rest.startswith(":") else f"{quoted}: {_suggest_value(schema)}"
        if rest.startswith('"'):
            insert += ","
        yield {
            "label": key,
            "insert": insert,
            "detail": _summarize(schema),
            "info": schema.get("description", ""),
        }


def _suggest_value(schema: Mapping[str, Any]) -> str:
    if "properties" in schema:
        return "{}"
    default = schema.get("default")
    return "" if default is None else json.dumps(default)


def _list_values(cursor: Cursor) -> Iterator[dict[str, Any]]:
    schema = _find_schema(cursor, cursor.key)
    if cursor.key == "type" and cursor.path[-1:] == ("optimizer",):
        for name, params in OPTIMIZERS.items():
            if "x-removed" not in params:
                yield _build_value(name, params.get("description", ""))
    elif cursor.key == "type" and _is_schedule_block(cursor.path):
        for name, cls in SCHEDULES.items():
            yield _build_value(name, get_summary(cls))
    values = list(schema.get("enum", ()))
    if "boolean" in _list_types(schema):
        values += [True, False]
    if schema.get("maximum", _MANY) < _MANY and "integer" in _list_types(schema):
        values += range(schema.get("minimum", 0), schema["maximum"] + 1)
    if "x-auto" in schema:
        values.append("auto")
    if schema.get("default") is not None:
        values.insert(0, schema["default"])
    for insert, value in {json.dumps(value): value for value in values}.items():
        is_default = "default" in schema and value == schema["default"]
        label = value if isinstance(value, str) else insert
        yield {"label": label, "insert": insert, "detail": "default" * is_default, "info": ""}


def _build_value(name: str, info: str) -> dict[str, Any]:
    return {"label": name, "insert": json.dumps(name), "detail": "", "info": info}


def _is_schedule_block(path: Any) -> bool:
    return path[-1:] == ("scheduler",) or "schedulers" in path[-2:]


def _describe_key(cursor: Cursor, schema: Mapping[str, Any]) -> Iterator[str]:
    kind = cursor.frames[-1].type
    if cursor.key == "type" and kind is not None and kind in SCHEDULES:
        yield schedule_schema(SCHEDULES[kind])["description"]
        return
    if schema.get("description"):
        yield schema["description"]
    if "properties" not in schema:
        yield f"Value: {_summarize(schema)}."
    if "x-instead" in schema:
        yield schema["x-instead"]
    if "x-backend" in schema:
        yield f"Backend: {schema['x-backend']} only."
    if "x-auto" in schema:
        names = schema["x-auto"].replace(", ", " or ")
        yield f'The value "auto" is filled in by {names}.'
    others = _read_other_names().get((cursor.path, cursor.key))
    if others:
        yield f"Names in other libraries: {', '.join(others)}."


@cache
def _read_other_names() -> dict[tuple[tuple[str, ...], str], list[str]]:
    """Return a dict that maps ``(section_path, key)`` to the key's names in other libraries."""
    found: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for pointer, names in schemas.read("aliases.json").items():
        for other, key in names.items():
            if " " in key:  # a hint instead of a name, because the value must change
                continue
            target = key if key.startswith("/") else f"{pointer}/{key}"
            *path, last = target.split("/")[1:]
            names_of_key = found.setdefault((tuple(path), last), [])
            if other not in names_of_key:
                names_of_key.append(other)
    return found


def _summarize(schema: Mapping[str, Any]) -> str:
    """Describe the valid values and the default of a key in a few words."""
    if "properties" in schema:
        return "section"
    default = schema.get("default")
    valid = describe_schema(schema)
    return valid if default is None else f"{valid}; default {quote_value(default)}"


def _list_types(schema: Mapping[str, Any]) -> list[str]:
    types = schema.get("type", [])
    return [types] if isinstance(types, str) else types


def _find_object_schema(cursor: Cursor) -> Mapping[str, Any]:
    """Return the schema of the innermost object around the cursor; empty if unknown."""
    schema: Mapping[str, Any] = schemas.read(SCHEMA)
    for depth, key in enumerate(cursor.path, start=1):
        schema = _find_member(schema, cursor.path[:depth], cursor.frames[depth - 1], key)
    return schema


def _find_schema(cursor: Cursor, key: str) -> Mapping[str, Any]:
    """Return the schema of ``key`` in the innermost object around the cursor; empty if unknown."""
    around = _find_object_schema(cursor)
    return _find_member(around, (*cursor.path, key), cursor.frames[-1], key)


def _find_member(
    schema: Mapping[str, Any], path: tuple[str, ...], around: Frame, key: str
) -> Mapping[str, Any]:
    if not around.is_object:
        return resolve_reference(schema.get("items", {}))
    if key == _PARAM_GROUPS and path == ("optimizer", _PARAM_GROUPS):
        name = optimizer_name(around.type or "")
        return build_group_schema(name) if name else {}
    if key == "params" and _is_schedule_block(path[:-1]) and around.type:
        try:
            return schedule_schema(find(around.type))
        except ValueError:
            return {}
    given = {"type": around.type}
    return get_member_schema(schema.get("properties", {}).get(key, {}), f"/{'/'.join(path)}", given)

"""Build the form for the scheduler block, and apply edits made in the form to the config's text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from engine.config.parser import Document, parse
from engine.config.pointers import join_pointer
from engine.config.schema import is_ignored, schedule_schema
from engine.config.text_edits import remove_key, set_value
from engine.display.catalog import EXAMPLE_RUN, EXAMPLE_STEPS, example_curves, get_summary
from schedules import SCHEDULES
from schedules.core.durations import convert_to_steps, get_unit
from schedules.core.fields import describe_schema

__all__ = ["build_form", "change_type", "list_gallery", "remove_param", "set_param"]

_PARAMS = "/scheduler/params"
_POINTS = 60
_STEPS = 1000
"""Assumed length of a run, in steps, if the actual length is unknown."""
_DURATION = re.compile(r"\s*[\d.eE+]+\s*(ep|ba|sp|dur)\s*")


def build_form(document: Document) -> dict[str, Any] | None:
    """Return the form for the scheduler block: the schedule's type, summary and fields.

    Return None if the config or the block is not a JSON object.

    Args:
        document: parsed config.
    """
    if not isinstance(document.value, Mapping):
        return None
    block = document.value.get("scheduler", {})
    if not isinstance(block, Mapping):
        return None
    name = block.get("type")
    params = block.get("params", {})
    cls = SCHEDULES.get(name) if isinstance(name, str) else None
    if cls is None or not isinstance(params, Mapping):
        return {"type": name if isinstance(name, str) else None, "summary": "", "fields": []}
    return {
        "type": name,
        "summary": get_summary(cls),
        "fields": list(_list_fields(schedule_schema(cls), params)),
    }


def _list_fields(schema: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    required = schema.get("required", ())
    for name, each in schema["properties"].items():
        is_set = name in params
        value = params.get(name, each.get("default"))
        yield {
            "name": name,
            "value": value,
            "isSet": is_set,
            "isRequired": name in required,
            "default": each.get("default"),
            "description": each.get("description", ""),
            "valid": describe_schema(each),
            "choices": each.get("enum"),
            "isBoolean": each.get("type") == "boolean",
            "slider": _choose_range(each, value),
        }


def _choose_range(schema: Mapping[str, Any], value: Any) -> dict[str, Any] | None:
    """Return the range of a field's slider, or None if the field is not a single number.

    A number that has no upper limit and cannot be negative gets a logarithmic slider around its
    current value.
    """
    types = schema.get("type", [])
    types = {types} if isinstance(types, str) else set(types)
    if not types & {"number", "integer"} or not isinstance(value, int | float | None):
        return None
    if isinstance(value, bool) or "enum" in schema:
        return None
    is_integer = "number" not in types
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    size = abs(value or 0)
    if low is not None and high is not None:
        # The limit itself can be excluded.
        margin = 0 if is_integer else (high - low) / 1000
        first = low + margin * ("exclusiveMinimum" in schema)
        last = high - margin * ("exclusiveMaximum" in schema)
        return {"scale": "linear", "min": first, "max": last, "isInteger": is_integer}
    if low is None or low < 0:
        reach = max(10 * size, 10)
        first = -reach if low is None else low
        return {"scale": "linear", "min": first, "max": reach, "isInteger": is_integer}
    first = max(1, low) if is_integer else max((size or 0.01) / 1000, low)
    last = max(100 * size, 1000) if is_integer else (size or 0.01) * 100
    last = min(last, high) if high is not None else last
    has_zero = low == 0 and "exclusiveMinimum" not in schema
    return {"scale": "log", "min": first, "max": last, "hasZero": has_zero, "isInteger": is_integer}


def set_param(text: str, name: str, value: Any) -> str:
    """Set a parameter of the schedule in a config's text, and return the new text.

    Raises:
        ValueError: the text is not a valid JSON object.
    """
    return set_value(_parse(text), join_pointer(_PARAMS, name), value)


def remove_param(text: str, name: str) -> str:
    """Remove a parameter of the schedule from a config's text, and return the new text.

    Raises:
        ValueError: the text is not a valid JSON object.
    """
    document, pointer = _parse(text), join_pointer(_PARAMS, name)
    return remove_key(document, pointer) if pointer in document.locations else text


def change_type(text: str, name: str, steps: int = _STEPS) -> str:
    """Change the type of the schedule in a config's text, and return the new text.

    Parameters that both types have keep their values and comments. Other parameters are removed,
    and missing parameters are added from the example of the new type.

    Args:
        text: text of the config.
        name: new type of the schedule.
        steps: length of the run in steps. The durations in the example are scaled to this length.

    Raises:
        ValueError: the text is not a valid JSON object, or the type is unknown.
    """
    if name not in SCHEDULES:
        raise ValueError(f"`type` must be the name of a schedule, got {name!r}. Select a schedule.")
    cls = SCHEDULES[name]
    document = _parse(text)
    block, run = document.value.get("scheduler"), document.value.get("engine")
    has_length = isinstance(run, Mapping) and "max_duration" in run
    schema = schedule_schema(cls)["properties"]
    # A duration such as "1dur" can also be a default.
    defaults = {key: each.get("default") for key, each in schema.items()}
    durations = {
        key: value
        for key, value in defaults.items()
        if isinstance(value, str) and _DURATION.fullmatch(value)
    }
    example = {
        key: _scale(value, schema[key], steps, has_length)
        for key, value in {**durations, **json.loads(json.dumps(dict(cls.example)))}.items()
    }
    example = {key: value for key, value in example.items() if value != defaults.get(key)}
    if not isinstance(block, Mapping) or not isinstance(block.get("params", {}), Mapping):
        return set_value(document, "/scheduler", {"type": name, "params": example})
    text = set_value(document, "/scheduler/type", name)
    old = block.get("params", {})
    for key, value in example.items():
        if key not in old:
            text = set_param(text, key, value)
    for key in old:
        if key not in schema and not is_ignored(key):
            text = remove_param(text, key)
    return text


def _scale(value: Any, schema: Mapping[str, Any], steps: int, has_length: bool) -> Any:
    """Scale the durations in a parameter's example value to a run of ``steps`` steps.

    If the config specifies the length of the run (``has_length``), fractions of the run, such as
    "0.5dur", stay unchanged.
    """
    if isinstance(value, list):
        return [_scale(each, schema.get("items", {}), steps, has_length) for each in value]
    if isinstance(value, Mapping):
        return {key: _scale(each, {}, steps, has_length) for key, each in value.items()}
    is_text = isinstance(value, str) and _DURATION.fullmatch(value) is not None
    is_count = type(value) is int and "pattern" in schema and value > 1
    if not (is_text or is_count) or (has_length and get_unit(value) == "dur"):
        return value
    length = convert_to_steps(value, EXAMPLE_RUN, scaled=False)
    return max(1, round(length * steps / int(EXAMPLE_RUN.total_steps or 1)))


def _parse(text: str) -> Document:
    document = parse(text, "config")
    if not isinstance(document.value, Mapping):
        raise ValueError(
            "The form can edit a config only if the config is a valid JSON object. Correct the "
            "config's text."
        )
    return document


@cache
def list_gallery() -> list[dict[str, Any]]:
    """Return each type of schedule, with its summary and the points of an example curve."""
    steps = [index * EXAMPLE_STEPS // _POINTS for index in range(_POINTS + 1)]
    gallery = []
    for name, cls in SCHEDULES.items():
        curve = example_curves(cls)["lr"]
        values = list(curve.values(EXAMPLE_STEPS + 1))
        gallery.append(
            {
                "name": name,
                "summary": get_summary(cls),
                "feedback": cls.feedback,
                "points": [values[step] for step in steps],
            }
        )
    return gallery

"""Check config values against a JSON schema, and report each violation as a `Problem`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
from referencing import Registry, Resource

import schemas
from engine.config.parser import Document
from engine.config.pointers import dotted_name, get_parent, join_pointer
from engine.config.schema import is_ignored, means_default
from engine.config.suggestions import Suggestion, suggest_key, wrap_in_section
from engine.config.wording import quote_value, shorten
from engine.errors import Fix, Problem
from schedules.core.durations import PATTERN, get_unit, list_examples, suggest_duration
from schedules.core.fields import describe_schema

__all__ = ["MAX_SUGGESTIONS", "check_against_schema", "get_suggested_pointer"]

_RANGE = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"}
MAX_SUGGESTIONS = 100
"""Maximum number of problems to find suggestions for. More would take too long."""
_NO_SUGGESTION = Suggestion("")
_REGISTRY: Registry[Any] = Registry(
    retrieve=lambda uri: Resource.from_contents(schemas.read(uri))  # type: ignore[call-arg]  # mypy does not know that attrs renames the field
)


def check_against_schema(
    document: Document, value: Any, schema: Mapping[str, Any], pointer: str = ""
) -> Iterator[Problem]:
    """Check a value and all nested values against a schema, and yield each violation.

    Args:
        document: parsed config, used to look up the line and column of each problem.
        value: value from the config to check.
        schema: JSON schema of the value.
        pointer: JSON pointer of the value.
    """
    validator = jsonschema.Draft202012Validator(schema, registry=_REGISTRY)
    problems: list[Problem] = []
    for error in validator.iter_errors(value):
        below = pointer
        for part in error.absolute_path:
            below = join_pointer(below, part)
        problems += _convert_error(document, error, below, MAX_SUGGESTIONS - len(problems))
    # A fraction in a key for whole numbers can violate both `type` and `minimum`.
    problems = list({(each.pointer, each.message): each for each in reversed(problems)}.values())
    problems.reverse()
    meant = {get_suggested_pointer(problem) for problem in problems}
    for problem in problems:
        # A misspelled required key is reported as an unknown key, but not also as a missing key.
        if problem.rule != "missing-key" or problem.suggestion not in meant:
            yield problem


def get_suggested_pointer(problem: Problem) -> str:
    """Return the JSON pointer of the key that a problem suggests in place of an unknown key.

    Return an empty string if the problem does not contain a suggestion.
    """
    found = problem.rule == "unknown-key" and problem.suggestion
    return join_pointer(get_parent(problem.pointer), problem.suggestion) if found else ""


def _convert_error(
    document: Document, error: jsonschema.ValidationError, pointer: str, suggestions: int
) -> Iterator[Problem]:
    """Convert a ``jsonschema`` validation error into problems in the config.

    For errors about unknown keys, only the first ``suggestions`` keys get a suggestion.
    """
    name = dotted_name(pointer) or "the config"
    keyword = str(error.validator)
    schema: Mapping[str, Any] = error.schema
    value = error.instance
    match keyword:
        case "additionalProperties":
            known = schema["properties"]
            unknown = (key for key in value if key not in known and not is_ignored(key))
            for index, key in enumerate(unknown):
                found = _NO_SUGGESTION
                if index < suggestions:
                    found = suggest_key(pointer, key, known, value)
                yield _build_unknown_key_problem(document, join_pointer(pointer, key), key, found)
        case "required":
            # jsonschema yields one error per missing key, but does not name the key.
            for missing in (key for key in error.validator_value if key not in value):
                takes = describe_schema(schema["properties"][missing])
                message = f"Missing key `{missing}` in {name}."
                below = join_pointer(pointer, missing)
                hint = f"Add the key. It accepts {takes}."
                yield document.build_problem(
                    "missing-key", pointer, message, hint, suggestion=below
                )
        case "not":
            message = f"`{name}` was removed in DeepSpeed {schema['x-removed']}."
            hint = schema["x-instead"]
            yield document.build_problem("removed-key", pointer, message, hint, at_key=True)
        case _ if value == "auto":
            replaced = schema.get("x-alias-of")
            hint = f"Set a value, or use `{replaced}`." if replaced else "Set a value."
            message = f"`{name}` must be {describe_schema(schema)}, "
            message += 'got "auto", which neither Transformers nor Accelerate replaces.'
            is_accepted = means_default(pointer, value)
            if is_accepted:
                message = (
                    f'`{name}` is "auto", but neither Transformers nor Accelerate replaces it. '
                    "The default is used."
                )
            yield document.build_problem(
                "unsupported-auto",
                pointer,
                message,
                hint,
                severity="warning" if is_accepted else "error",
            )
        case _ if keyword in {"type", "enum", "pattern"} | _RANGE:
            message = f"`{name}` must be {describe_schema(schema)}, got {quote_value(value)}."
            takes_auto = keyword == "pattern" and error.validator_value == "^auto$"
            kind = "wrong-type" if keyword == "type" or takes_auto else "out-of-range"
            hint, fix = "", None
            if kind == "wrong-type" or keyword == "pattern":
                hint, fix = _suggest_unquoting(value, schema)
            if not hint:
                hint, fix = _suggest_duration(value, schema)
            hint = (
                hint
                or _suggest_fraction_of_run(value, schema)
                or _suggest_plain_number(value, schema)
                or _suggest_section(value, schema)
            )
            yield document.build_problem(kind, pointer, message, hint, fix=fix)
        case _:
            raise AssertionError(f"no message is defined for the JSON Schema keyword `{keyword}`")


def _suggest_fraction_of_run(value: Any, schema: Mapping[str, Any]) -> str:
    """Return a hint if a value was probably meant as a fraction of the run; otherwise ""."""
    accepts_fractions = "[dD][uU][rR]" in schema.get("pattern", "")
    if not accepts_fractions or not isinstance(value, float) or not 0 < value < 1:
        return ""
    return f'Write "{value:g}dur" for a fraction of the run.'


def _suggest_duration(value: object, schema: Mapping[str, Any]) -> tuple[str, Fix | None]:
    """Suggest a valid duration to replace an invalid string such as "200 steps".

    Returns:
        A hint and an automatic fix. If there is no valid duration to suggest, the hint lists
        examples of valid durations, and the fix is None. If the value is not a string or the key
        does not accept durations, the hint is empty and the fix is None.
    """
    pattern = schema.get("pattern", "")
    if not isinstance(value, str) or not pattern or not re.search(pattern, "10ep"):
        return "", None
    meant = suggest_duration(value)
    validator = jsonschema.Draft202012Validator(schema, registry=_REGISTRY)
    if meant is not None and validator.is_valid(meant):
        return f"Did you mean {json.dumps(meant)}?", Fix(value=meant, is_certain=False)
    return f"Write a number of steps, such as 200, or {list_examples(pattern)}.", None


def _suggest_plain_number(value: object, schema: Mapping[str, Any]) -> str:
    """Return a hint if a value is a time string, such as "1ep", but must be a number."""
    types = schema.get("type", ())
    takes_number = "integer" in types or "number" in types
    if not isinstance(value, str) or not re.match(PATTERN, value) or not takes_number:
        return ""
    return f"Write a number; the key does not accept the unit `{get_unit(value)}`."


def _suggest_section(value: object, schema: Mapping[str, Any]) -> str:
    """Return a hint if a single value was given instead of a section; otherwise ""."""
    section = wrap_in_section({"true": True, "false": False}.get(str(value), value), schema)
    return f"Write {section}." if section else ""


def _suggest_unquoting(value: Any, schema: Mapping[str, Any]) -> tuple[str, Fix | None]:
    """Suggest removing the quotes from a string such as "1" or "True".

    Returns:
        A hint and an automatic fix. If the value is also invalid without quotes, the hint is empty
        and the fix is None.
    """
    if not isinstance(value, str):
        return "", None
    try:
        meant = json.loads(value.strip().lower())
    except ValueError:
        return "", None
    validator = jsonschema.Draft202012Validator(schema, registry=_REGISTRY)
    is_infinite = isinstance(meant, float) and not math.isfinite(meant)
    if is_infinite or not validator.is_valid(meant):
        return "", None
    return f"Write {json.dumps(meant)} without quotes.", Fix(value=meant)


def _build_unknown_key_problem(
    document: Document, pointer: str, key: str, found: Suggestion
) -> Problem:
    message = f"Unknown key `{shorten(key)}`."
    return document.build_problem(
        "unknown-key",
        pointer,
        message,
        found.hint or 'Remove the key, or start the key with "//" or "x-" to keep it as a comment.',
        at_key=True,
        fix=found.fix,
        suggestion=found.meant,
    )

"""Each value of a config by itself, against its JSON schema."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
from referencing import Registry, Resource

import schemas
from engine.config.parser import Document
from engine.config.pointers import pointer_to
from engine.config.schema import is_parked, walk
from engine.config.suggestions import suggestion
from engine.errors import Fix, Problem
from schedules.core.fields import wanted

__all__ = ["against_schema", "meant_by", "remarks", "shown"]

_RANGE = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"}
_REGISTRY: Registry[Any] = Registry(
    retrieve=lambda uri: Resource.from_contents(schemas.read(uri))  # type: ignore[call-arg]  # attrs field, renamed
)


def against_schema(
    document: Document, value: Any, schema: Mapping[str, Any], pointer: str = ""
) -> Iterator[Problem]:
    """Yield what is wrong with a value and all below it, each thing by itself.

    Args:
        document: where the places come from.
        value: a part of its value.
        schema: what that part must be.
        pointer: where the part is.
    """
    validator = jsonschema.Draft202012Validator(schema, registry=_REGISTRY)
    problems: list[Problem] = []
    for error in validator.iter_errors(value):
        below = pointer
        for part in error.absolute_path:
            below = pointer_to(below, part)
        problems += _problems_of(document, error, below)
    problems = list({(each.rule, each.pointer, each.message): each for each in problems}.values())
    meant = {meant_by(problem) for problem in problems}
    for problem in problems:
        # A key that is missing because it is misspelt is said once.
        if problem.rule != "missing-key" or problem.suggestion not in meant:
            yield problem


def meant_by(problem: Problem) -> str:
    """Return the pointer of the key that was probably meant by an unknown one, or nothing."""
    around = problem.pointer.rpartition("/")[0]
    found = problem.rule == "unknown-key" and problem.suggestion
    return pointer_to(around, problem.suggestion) if found else ""


def _problems_of(
    document: Document, error: jsonschema.ValidationError, pointer: str
) -> Iterator[Problem]:
    name = ".".join(pointer.split("/")[1:]) or "the config"
    keyword = str(error.validator)
    schema: Mapping[str, Any] = error.schema
    value = error.instance
    match keyword:
        case "additionalProperties":
            known = schema["properties"]
            for key in value:
                if key not in known and not is_parked(key):
                    yield _unknown_key(document, pointer, key, known, value)
        case "required":
            # jsonschema has an error for each, and none of them says which it is of.
            for missing in (key for key in error.validator_value if key not in value):
                takes = wanted(schema["properties"][missing])
                message = f"`{missing}` must be given in {name}, but is missing."
                below = pointer_to(pointer, missing)
                hint = f"It takes {takes}."
                yield document.problem("missing-key", pointer, message, hint, suggestion=below)
        case "not":
            message = f"`{name}` was removed from DeepSpeed in {schema['x-removed']}."
            hint = schema["x-instead"]
            yield document.problem("removed-key", pointer, message, hint, at_key=True)
        case _ if value == "auto":
            message = (
                f'`{name}` must be {wanted(schema)}, but is "auto", which nobody fills in here.'
            )
            yield document.problem("auto-nobody-fills", pointer, message, "Write the value.")
        case _ if keyword in {"type", "enum", "pattern"} | _RANGE:
            message = f"`{name}` must be {wanted(schema)}, but is {shown(value)} instead."
            takes_auto = keyword == "pattern" and error.validator_value == "^auto$"
            kind = "wrong-type" if keyword == "type" or takes_auto else "out-of-range"
            hint, fix = _unquoted(value, schema) if kind == "wrong-type" else ("", None)
            yield document.problem(kind, pointer, message, hint, fix=fix)
        case _:
            raise AssertionError(f"a schema uses {keyword}, which has no message")


def _unquoted(value: Any, schema: Mapping[str, Any]) -> tuple[str, Fix | None]:
    """Return the cure of a number or truth value in quotes, in any spelling of the latter."""
    if not isinstance(value, str):
        return "", None
    try:
        meant = json.loads(value.strip().lower())
    except ValueError:
        return "", None
    validator = jsonschema.Draft202012Validator(schema, registry=_REGISTRY)
    endless = isinstance(meant, float) and not math.isfinite(meant)
    if endless or not validator.is_valid(meant):
        return "", None
    return f"Write {json.dumps(meant)}, without the quotes.", Fix(value=meant)


def _unknown_key(
    document: Document, pointer: str, key: str, known: Mapping[str, Any], present: Mapping[str, Any]
) -> Problem:
    found = suggestion(pointer, key, known, present)
    message = f"`{shown_key(key)}` is no key that anything here reads."
    return document.problem(
        "unknown-key",
        pointer_to(pointer, key),
        message,
        found.hint or 'If it is a note, let it begin with "//" or "x-".',
        at_key=True,
        fix=found.fix,
        suggestion=found.meant,
    )


def remarks(document: Document, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a note for each key that still works under an old name."""
    for pointer, _, of_key in walk(value, schema):
        if of_key.get("deprecated"):
            key = pointer.rpartition("/")[2]
            instead = of_key.get("x-instead", "")
            renamed = instead.isidentifier()
            hint = f"Write `{instead}`." if renamed or "." in instead[:-1] else instead
            fix = Fix(key=instead) if renamed else None
            message = f"`{key}` is an old spelling, which DeepSpeed still reads."
            yield document.problem(
                "deprecated-key", pointer, message, hint, at_key=True, severity="note", fix=fix
            )


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "…"


def shown_key(key: str) -> str:
    """Return a key as a message shows it."""
    return key if len(key) <= 60 else key[:57] + "…"

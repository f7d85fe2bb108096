"""Check each value of a config against its JSON schema, and construct its schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema
from referencing import Registry, Resource

import schemas
from engine.config.parser import Document
from engine.config.pointers import dotted_name, is_within, key_at, parent_of, pointer_to, without
from engine.config.schedule_context import horizon_if_known
from engine.config.schema import (
    OPTIMIZERS,
    SCHEMA,
    Member,
    is_parked,
    optimizer_name,
    optimizer_schema,
    schedule_schema,
    walk,
)
from engine.config.suggestions import suggestion
from engine.config.wording import quote_value, shorten
from engine.errors import Fix, Problem
from schedules import SCHEDULES, Schedule, ScheduleError, from_config
from schedules.core.durations import DurationError
from schedules.core.fields import describe_schema, read_fields
from schedules.core.registry import find
from schedules.core.spelling import find_nearest

__all__ = ["Structure", "against_schema", "check_structure"]

_RANGE = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"}
_REGISTRY: Registry[Any] = Registry(
    retrieve=lambda uri: Resource.from_contents(schemas.read(uri))  # type: ignore[call-arg]  # mypy does not know that attrs renames the field
)


@dataclass(frozen=True)
class Structure:
    """The result of checking each value of a config against its schema.

    The rules that check combinations of values use this result.
    """

    problems: Sequence[Problem]
    config: Mapping[str, Any]
    """The config without invalid values and without "auto" values."""
    members: Sequence[Member]
    """The config's keys with their schemas, except keys that the schema rejects."""
    unsure: Collection[str]
    """Pointers of invalid values, of "auto" values, and of keys that were probably misspelled."""
    schedule: Schedule[Any] | None
    """The schedule in ``config``; None if there is none or it cannot be constructed."""


def check_structure(document: Document) -> Structure:
    """Check each value of a config against its schema, and construct the config's schedule.

    Args:
        document: parsed config; its value must be an object.
    """
    schema = schemas.read(SCHEMA)
    problems = list(against_schema(document, document.value, schema))
    invalid = {problem.pointer for problem in problems} - {""}
    config = without(document.value, invalid)
    members = list(walk(config, schema))
    for key, check_block in (("optimizer", _check_optimizer), ("scheduler", _check_scheduler)):
        block = config.get(key)
        if isinstance(block, dict) and "type" in block and f"/{key}/params" not in invalid:
            problems += check_block(document, block)
    problems += _find_deprecated(document)
    unsure = {each.pointer for each in members if each.value == "auto" and "x-auto" in each.schema}
    unsure |= _pointers_of_errors(problems)
    config = without(config, unsure)
    schedule, from_schedule = _construct_schedule(document, config, unsure)
    problems += from_schedule
    unsure |= _pointers_of_errors(from_schedule)
    return Structure(problems, without(config, unsure), members, frozenset(unsure), schedule)


def _pointers_of_errors(problems: Sequence[Problem]) -> set[str]:
    errors = [problem for problem in problems if problem.severity == "error"]
    return {
        found for problem in errors for found in (problem.pointer, _suggested_pointer(problem))
    } - {""}


def against_schema(
    document: Document, value: Any, schema: Mapping[str, Any], pointer: str = ""
) -> Iterator[Problem]:
    """Yield a problem for each violation of the schema in a value and in its nested values.

    Args:
        document: parsed config, which provides the positions of problems.
        value: value to check; a part of the config.
        schema: JSON schema of the value.
        pointer: JSON pointer of the value.
    """
    validator = jsonschema.Draft202012Validator(schema, registry=_REGISTRY)
    problems: list[Problem] = []
    for error in validator.iter_errors(value):
        below = pointer
        for part in error.absolute_path:
            below = pointer_to(below, part)
        problems += _convert_error(document, error, below)
    problems = list({(each.rule, each.pointer, each.message): each for each in problems}.values())
    meant = {_suggested_pointer(problem) for problem in problems}
    for problem in problems:
        # A misspelled required key is reported as an unknown key, but not also as a missing key.
        if problem.rule != "missing-key" or problem.suggestion not in meant:
            yield problem


def _suggested_pointer(problem: Problem) -> str:
    """Return the pointer of the known key that the user probably meant.

    Return an empty string if the problem is not an unknown key, or if there is no suggestion.
    """
    found = problem.rule == "unknown-key" and problem.suggestion
    return pointer_to(parent_of(problem.pointer), problem.suggestion) if found else ""


def _convert_error(
    document: Document, error: jsonschema.ValidationError, pointer: str
) -> Iterator[Problem]:
    name = dotted_name(pointer) or "the config"
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
            # jsonschema yields one error per missing key, but does not name the key.
            for missing in (key for key in error.validator_value if key not in value):
                takes = describe_schema(schema["properties"][missing])
                message = f"Missing key `{missing}` in {name}."
                below = pointer_to(pointer, missing)
                hint = f"It accepts {takes}."
                yield document.problem("missing-key", pointer, message, hint, suggestion=below)
        case "not":
            message = f"`{name}` was removed in DeepSpeed {schema['x-removed']}."
            hint = schema["x-instead"]
            yield document.problem("removed-key", pointer, message, hint, at_key=True)
        case _ if value == "auto":
            message = (
                f"`{name}` must be {describe_schema(schema)}, "
                'got "auto", which no integration replaces.'
            )
            yield document.problem("unsupported-auto", pointer, message, "Set a value.")
        case _ if keyword in {"type", "enum", "pattern"} | _RANGE:
            message = f"`{name}` must be {describe_schema(schema)}, got {quote_value(value)}."
            takes_auto = keyword == "pattern" and error.validator_value == "^auto$"
            kind = "wrong-type" if keyword == "type" or takes_auto else "out-of-range"
            hint, fix = _suggest_unquoting(value, schema) if kind == "wrong-type" else ("", None)
            yield document.problem(kind, pointer, message, hint, fix=fix)
        case _:
            raise AssertionError(f"no message is defined for the schema keyword {keyword}")


def _suggest_unquoting(value: Any, schema: Mapping[str, Any]) -> tuple[str, Fix | None]:
    """Return a hint and a fix if a value would be valid without quotes, such as "1" or "True"."""
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


def _unknown_key(
    document: Document, pointer: str, key: str, known: Mapping[str, Any], present: Mapping[str, Any]
) -> Problem:
    found = suggestion(pointer, key, known, present)
    message = f"Unknown key `{shorten(key)}`."
    return document.problem(
        "unknown-key",
        pointer_to(pointer, key),
        message,
        found.hint or 'To keep it as a note, start the key with "//" or "x-".',
        at_key=True,
        fix=found.fix,
        suggestion=found.meant,
    )


def _find_deprecated(document: Document) -> Iterator[Problem]:
    """Yield a note for each deprecated key."""
    for member in walk(document.value, schemas.read(SCHEMA)):
        if member.schema.get("deprecated"):
            instead = member.schema.get("x-instead", "")
            renamed = instead.isidentifier()
            hint = f"Use `{instead}`." if instead and " " not in instead else instead
            fix = Fix(key=instead) if renamed else None
            message = f"`{key_at(member.pointer)}` is deprecated."
            yield document.problem(
                "deprecated-key",
                member.pointer,
                message,
                hint,
                at_key=True,
                severity="note",
                fix=fix,
            )


def _check_optimizer(document: Document, block: Mapping[str, Any]) -> Iterator[Problem]:
    name = optimizer_name(block["type"])
    if name is None:
        usable = [known for known, schema in OPTIMIZERS.items() if "x-removed" not in schema]
        near = find_nearest(block["type"], OPTIMIZERS)
        hint = (
            f"Did you mean `{near}`?"
            if near
            else "Pass any other optimizer to `initialize(optimizer=…)`."
        )
        message = (
            f"`optimizer.type` must be one of {', '.join(usable)}, "
            f"got {quote_value(block['type'])}."
        )
        yield document.problem("unknown-optimizer", "/optimizer/type", message, hint)
        return
    schema = optimizer_schema(name)
    if "x-removed" in schema:
        message = f"The optimizer {name} was removed in DeepSpeed {schema['x-removed']}."
        yield document.problem("removed-key", "/optimizer/type", message, schema["x-instead"])
        return
    yield from against_schema(document, block.get("params", {}), schema, "/optimizer/params")


def _check_scheduler(document: Document, block: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        cls = find(block["type"])
    except ValueError as error:
        yield document.problem("unknown-scheduler", "/scheduler/type", str(error))
        return
    params, schema = block.get("params", {}), schedule_schema(cls)
    for problem in against_schema(document, params, schema, "/scheduler/params"):
        yield _add_owners(problem)


def _add_owners(problem: Problem) -> Problem:
    """Replace the hint of an unknown parameter with the names of schedules that have it, if any."""
    if problem.rule != "unknown-key" or "`" in problem.hint:
        return problem
    key = key_at(problem.pointer)
    owners = [name for name, cls in SCHEDULES.items() if key in read_fields(cls)]
    hint = f"It is a parameter of {', '.join(owners[:5])}."
    return dataclasses.replace(problem, hint=hint) if owners else problem


def _construct_schedule(
    document: Document, config: Mapping[str, Any], unsure: Collection[str]
) -> tuple[Schedule[Any] | None, list[Problem]]:
    """Construct the config's schedule; return it with the problems of its parameters.

    Problems are returned only if no parameter is invalid or "auto".
    """
    block = config.get("scheduler")
    if not isinstance(block, Mapping) or "type" not in block:
        return None, []
    pointer, params = "/scheduler/params", block.get("params", {})
    schedule = None
    problems = []
    try:
        schedule = from_config({"type": block["type"], "params": params})
        horizon = horizon_if_known(schedule, config)
        if horizon is not None:
            schedule.resolve(horizon)
    except ScheduleError as error:
        for fault in error.problems:
            below = pointer_to(pointer, fault.field) if fault.field else pointer
            problems.append(document.problem("schedule", below, fault.message))
        # Construct the schedule without the invalid parameters for rules that do not need them.
        invalid = {fault.field for fault in error.problems}
        valid = {name: value for name, value in params.items() if name not in invalid}
        with contextlib.suppress(ValueError):
            schedule = from_config({"type": block["type"], "params": valid})
    except DurationError as error:
        problems.append(document.problem("schedule", "/engine/max_duration", str(error)))
    except ValueError:
        return None, []  # the type is unknown, or `params` is not an object
    is_complete = not any(is_within(each, [pointer]) for each in unsure)
    return schedule, problems if is_complete else []

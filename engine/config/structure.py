"""Check each value of a config against its JSON schema, and construct the schedule."""

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
from engine.config.batch_sizes import DataRanks, RankCounter, count_data_ranks
from engine.config.named_code import check_named_code
from engine.config.optimizer_types import find_optimizer_schema
from engine.config.parser import Document
from engine.config.pointers import (
    dotted_name,
    get_last_key,
    get_parent,
    is_within,
    join_pointer,
    remove_keys,
)
from engine.config.schedule_context import (
    build_horizon,
    get_train_batch_size,
    list_possible_horizons,
)
from engine.config.schema import (
    SCHEMA,
    Member,
    is_ignored,
    means_default,
    schedule_schema,
    walk,
)
from engine.config.suggestions import Suggestion, suggest_key
from engine.config.wording import quote_value, shorten
from engine.errors import Fix, Problem
from schedules import SCHEDULES, Horizon, Schedule, ScheduleError, from_config
from schedules.core.durations import DurationError
from schedules.core.fields import describe_schema, read_fields
from schedules.core.imports import ImportForbiddenError, are_imports_allowed
from schedules.core.registry import find, read_torch_parameters
from schedules.core.schedule import ParameterProblem

__all__ = ["Structure", "check_against_schema", "check_structure"]

_RANGE = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"}
_MAX_SUGGESTIONS = 100
_NO_SUGGESTION = Suggestion("")
_REGISTRY: Registry[Any] = Registry(
    retrieve=lambda uri: Resource.from_contents(schemas.read(uri))  # type: ignore[call-arg]  # mypy does not know that attrs renames the field
)


@dataclass(frozen=True)
class Structure:
    """The result of checking each value of a config against its schema.

    The rules that check combinations of values use this result as their input.
    """

    problems: Sequence[Problem]
    config: Mapping[str, Any]
    """The config without invalid values and without "auto" values."""
    members: Sequence[Member]
    """The config's keys with their schemas, except keys that the schema rejects."""
    unresolved: Collection[str]
    """Pointers of invalid values, "auto" values, and probably misspelled keys."""
    schedule: Schedule[Any] | None
    """The schedule in ``config``; None if there is none or it cannot be constructed."""
    data_ranks: DataRanks | None
    """The number of ranks that load different samples; None if the world size is unknown."""


def check_structure(
    document: Document, world_size: int | None, count_ranks: RankCounter = count_data_ranks
) -> Structure:
    """Check each value of a config against its schema, and construct the config's schedule.

    Args:
        document: parsed config; its value must be an object.
        world_size: number of ranks; None if unknown.
        count_ranks: function of the config and the world size that returns how many ranks load
            different samples.
    """
    schema = schemas.read(SCHEMA)
    problems = list(check_against_schema(document, document.value, schema))
    invalid = {problem.pointer for problem in problems} - {""}
    config = remove_keys(document.value, invalid)
    members = list(walk(config, schema))
    ranks = None if world_size is None else count_ranks(config, world_size)
    for key, check_block in (("optimizer", _check_optimizer), ("scheduler", _check_scheduler)):
        block = config.get(key)
        if isinstance(block, dict) and "type" in block and f"/{key}/params" not in invalid:
            problems += check_block(document, block)
    problems += _find_deprecated(document)
    if not invalid & {"/engine", "/engine/max_duration", "/engine/scale_schedule_ratio"}:
        problems += _check_run_length(document, config, ranks)
    unresolved = {
        each.pointer for each in members if each.value == "auto" and "x-auto" in each.schema
    }
    unresolved |= _get_error_pointers(problems)
    config = remove_keys(config, unresolved)
    schedule, from_schedule = _construct_schedule(document, config, unresolved, ranks)
    problems += from_schedule
    unresolved |= _get_error_pointers(from_schedule)
    config = remove_keys(config, unresolved)
    return Structure(problems, config, members, frozenset(unresolved), schedule, ranks)


def _get_error_pointers(problems: Sequence[Problem]) -> set[str]:
    errors = [problem for problem in problems if problem.severity == "error"]
    return {
        found for problem in errors for found in (problem.pointer, _get_suggested_pointer(problem))
    } - {""}


def check_against_schema(
    document: Document, value: Any, schema: Mapping[str, Any], pointer: str = ""
) -> Iterator[Problem]:
    """Check a value and its nested values against a schema, and yield a problem per violation.

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
        problems += _convert_error(document, error, below, _MAX_SUGGESTIONS - len(problems))
    # A fraction in a key for whole numbers can violate both `type` and `minimum`.
    problems = list({(each.pointer, each.message): each for each in reversed(problems)}.values())
    problems.reverse()
    meant = {_get_suggested_pointer(problem) for problem in problems}
    for problem in problems:
        # A misspelled required key is reported as an unknown key, but not also as a missing key.
        if problem.rule != "missing-key" or problem.suggestion not in meant:
            yield problem


def _get_suggested_pointer(problem: Problem) -> str:
    """Return the JSON pointer of the key that a problem suggests instead of an unknown key.

    Return an empty string if the problem is not about an unknown key, or suggests no key.
    """
    found = problem.rule == "unknown-key" and problem.suggestion
    return join_pointer(get_parent(problem.pointer), problem.suggestion) if found else ""


def _convert_error(
    document: Document, error: jsonschema.ValidationError, pointer: str, suggestions: int
) -> Iterator[Problem]:
    """Convert an error of the ``jsonschema`` package to problems of the config.

    If the error is about unknown keys, suggest known keys only for the first ``suggestions`` keys.
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
            message += 'got "auto", which no integration replaces.'
            is_accepted = means_default(pointer, value)
            if is_accepted:
                message = f'`{name}` is "auto", which no integration replaces. The default is used.'
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
            hint, fix = _suggest_unquoting(value, schema) if kind == "wrong-type" else ("", None)
            hint = hint or _suggest_fraction_of_run(value, schema)
            yield document.build_problem(kind, pointer, message, hint, fix=fix)
        case _:
            raise AssertionError(f"no message is defined for the JSON Schema keyword `{keyword}`")


def _suggest_fraction_of_run(value: Any, schema: Mapping[str, Any]) -> str:
    """Return a hint if a duration is probably a fraction of the run, or else an empty string."""
    accepts_fractions = "[dD][uU][rR]" in schema.get("pattern", "")
    if not accepts_fractions or not isinstance(value, float) or not 0 < value < 1:
        return ""
    return f'Write "{value:g}dur" for a fraction of the run.'


def _suggest_unquoting(value: Any, schema: Mapping[str, Any]) -> tuple[str, Fix | None]:
    """Suggest removing the quotes from a string such as "1" or "True".

    Returns:
        A hint and an automatic fix. If the value would still be invalid without quotes, the hint is
        empty and the fix is None.
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


def _find_deprecated(document: Document) -> Iterator[Problem]:
    """Yield a note for each deprecated key, or an error if its replacement is set as well."""
    for member in walk(document.value, schemas.read(SCHEMA)):
        if not member.schema.get("deprecated"):
            continue
        instead, name = member.schema.get("x-instead", ""), get_last_key(member.pointer)
        parent = get_parent(member.pointer)
        siblings = document.get_value(parent)
        # DeepSpeed checks this in the sections, but not for the keys at the top.
        replacement = instead.split(".")[0]
        values = (member.value, siblings.get(replacement, "auto"))
        if parent and "auto" not in values:
            yield document.build_problem(
                "deprecated-key",
                member.pointer,
                f"`{name}` is the deprecated form of `{instead}`, and DeepSpeed rejects a config "
                f"with both `{name}` and `{replacement}`.",
                f"Remove `{name}`.",
                at_key=True,
            )
        elif instead not in siblings:
            hint = f"Use `{instead}`." if instead and " " not in instead else instead
            fix = Fix(key=instead) if instead.isidentifier() else None
            message = f"`{name}` is deprecated."
            yield document.build_problem(
                "deprecated-key",
                member.pointer,
                message,
                hint,
                at_key=True,
                severity="note",
                fix=fix,
            )


def _check_optimizer(document: Document, block: Mapping[str, Any]) -> Iterator[Problem]:
    found = find_optimizer_schema(document, block["type"])
    if isinstance(found, Problem):
        yield found
    else:
        params = block.get("params", {})
        yield from check_against_schema(document, params, found, "/optimizer/params")


def _check_scheduler(document: Document, block: Mapping[str, Any]) -> Iterator[Problem]:
    if not are_imports_allowed():
        yield from check_named_code(document, block)
    try:
        schema: Mapping[str, Any] = schedule_schema(find(block["type"]))
    except ImportForbiddenError:
        schema = _read_torch_schema(block["type"])
    except ValueError as error:
        yield document.build_problem("unknown-scheduler", "/scheduler/type", str(error))
        return
    params = block.get("params", {})
    problems = check_against_schema(document, params, schema, "/scheduler/params")
    for index, problem in enumerate(problems):
        yield _suggest_schedules(problem) if index < _MAX_SUGGESTIONS else problem


def _check_run_length(
    document: Document, config: Mapping[str, Any], ranks: DataRanks | None
) -> Iterator[Problem]:
    """Yield an error if the run is too long, or shorter than one step.

    The length of the dataset is unknown, so each epoch is assumed to have one step.
    """
    samples = get_train_batch_size(config, ranks) or 1
    try:
        build_horizon(config.get("engine", {}), samples_per_step=samples, steps_per_epoch=1)
    except ValueError as error:
        yield document.build_problem("out-of-range", "/engine/max_duration", str(error))


def _read_torch_schema(name: str) -> Mapping[str, Any]:
    """Return a JSON schema that contains the parameter names of a PyTorch scheduler.

    The names are read from PyTorch's source code, because validation does not import PyTorch. The
    schema is empty if PyTorch has no scheduler of this name.
    """
    parameters = read_torch_parameters(name)
    if parameters is None:
        return {}
    return {
        "properties": {each: {} for each in parameters},
        "required": [each for each, is_required in parameters.items() if is_required],
        "additionalProperties": False,
    }


def _suggest_schedules(problem: Problem) -> Problem:
    """If a problem is about an unknown parameter, list the schedules that have it in the hint.

    Other problems are returned unchanged.
    """
    if problem.rule != "unknown-key" or "`" in problem.hint:
        return problem
    key = get_last_key(problem.pointer)
    owners = [name for name, cls in SCHEDULES.items() if key in read_fields(cls)]
    hint = f"It is a parameter of {', '.join(owners[:5])}."
    return dataclasses.replace(problem, hint=hint) if owners else problem


def _construct_schedule(
    document: Document,
    config: Mapping[str, Any],
    unresolved: Collection[str],
    ranks: DataRanks | None,
) -> tuple[Schedule[Any] | None, list[Problem]]:
    """Construct the config's schedule.

    Returns:
        The schedule, or None if it cannot be constructed, and the problems of its parameters. The
        list of problems is empty if a parameter of the schedule is in ``unresolved``, because its
        value, which is invalid or "auto", could be the cause of the problems.
    """
    block = config.get("scheduler")
    if not isinstance(block, Mapping) or "type" not in block:
        return None, []
    pointer, params = "/scheduler/params", block.get("params", {})
    schedule = None
    problems = []
    try:
        schedule = from_config({"type": block["type"], "params": params})
        _resolve_in_any_run(schedule, list_possible_horizons(schedule, config, ranks))
    except ScheduleError as error:
        for fault in error.problems:
            below = join_pointer(pointer, fault.field) if fault.field else pointer
            problems.append(document.build_problem("schedule", below, fault.message))
        # Construct the schedule without the invalid parameters for rules that do not need them.
        invalid = {fault.field for fault in error.problems}
        valid = {name: value for name, value in params.items() if name not in invalid}
        with contextlib.suppress(ValueError):
            schedule = from_config({"type": block["type"], "params": valid})
    except DurationError as error:
        problems.append(document.build_problem("schedule", "/engine/max_duration", str(error)))
    except ValueError:
        return None, []  # the type is unknown or not imported, or `params` is not an object
    is_complete = not any(is_within(each, [pointer]) for each in unresolved)
    return schedule, problems if is_complete else []


def _resolve_in_any_run(schedule: Schedule[Any], horizons: Sequence[Horizon]) -> None:
    """Check that a schedule is valid for at least one of the possible lengths of its run.

    Raises:
        ScheduleError: a parameter is invalid for every possible length.
    """
    found: list[dict[str | None, ParameterProblem]] = []
    for horizon in horizons:
        try:
            schedule.resolve(horizon)
        except ScheduleError as error:  # noqa: PERF203  # one error per length
            found.append({problem.field: problem for problem in error.problems})
            if len(horizons) == 1:
                raise
        else:
            return
    first, *others = found
    problems = [first[field] for field in first if all(field in each for each in others)]
    for index, problem in enumerate(problems):
        if any(each[problem.field].message != problem.message for each in others):
            message = f"{problem.message} These numbers of steps are examples: they depend on the "
            message += "data set or the batch size, but the problem does not."
            problems[index] = dataclasses.replace(problem, message=message)
    if problems:
        raise ScheduleError(schedule.type_name, problems)

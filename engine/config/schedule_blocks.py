"""Check the ``scheduler`` blocks of a config, and construct their schedules."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from engine.config.batch_sizes import DataRanks
from engine.config.named_code import check_named_code
from engine.config.parser import Document
from engine.config.pointers import (
    get_last_key,
    get_parent,
    is_within,
    join_pointer,
    split_pointer,
)
from engine.config.schedule_context import list_possible_horizons
from engine.config.schema import schedule_schema
from engine.config.violations import MAX_SUGGESTIONS, check_against_schema
from engine.errors import Fix, Problem
from schedules import SCHEDULES, Horizon, Schedule, ScheduleError, from_config
from schedules.core.durations import DurationError
from schedules.core.fields import read_fields
from schedules.core.imports import ImportForbiddenError, are_imports_allowed
from schedules.core.registry import find, read_torch_parameters, suggest
from schedules.core.schedule import ParameterProblem

__all__ = ["build_problems", "check_scheduler", "construct_schedule"]

_MIN_UNKNOWN = 2  # unknown parameters, to suggest another type; one can be a misspelling


def check_scheduler(
    document: Document, block: Mapping[str, Any], pointer: str = "/scheduler"
) -> Iterator[Problem]:
    """Check the type of a ``scheduler`` block and each of its params, and yield the problems.

    Args:
        document: parsed config.
        block: block that has a ``type`` and is valid against the schema of ``scheduler``.
        pointer: JSON pointer of the block.
    """
    if not are_imports_allowed():
        yield from check_named_code(document, block, pointer)
    try:
        schema: Mapping[str, Any] = schedule_schema(find(block["type"]))
    except ImportForbiddenError:
        schema = _read_torch_schema(block["type"])
    except ValueError as error:
        near = suggest(block["type"])
        fix = Fix(value=near, is_certain=False) if near and ":" not in block["type"] else None
        yield document.build_problem("unknown-scheduler", f"{pointer}/type", str(error), fix=fix)
        return
    params = block.get("params", {})
    problems = [*check_against_schema(document, params, schema, f"{pointer}/params")]
    unknown = [
        get_last_key(each.pointer)
        for each in problems
        if each.rule == "unknown-key" and get_parent(each.pointer) == f"{pointer}/params"
    ]
    if meant := _find_other_type(params, unknown):
        message = f"{block['type']} has no parameters {', '.join(f'`{key}`' for key in unknown)}."
        hint = f"They are parameters of {meant}. Did you mean `{meant}`?"
        fix = Fix(value=meant, is_certain=False)
        yield document.build_problem("unknown-key", f"{pointer}/type", message, hint, fix=fix)
        return
    for index, problem in enumerate(problems):
        yield _suggest_schedules(problem) if index < MAX_SUGGESTIONS else problem


def _read_torch_schema(name: str) -> Mapping[str, Any]:
    """Return a JSON schema that contains the parameter names of a PyTorch scheduler.

    The names are read from PyTorch's source code, because validation does not import PyTorch. If
    PyTorch does not have the scheduler, the schema is empty.
    """
    parameters = read_torch_parameters(name)
    if parameters is None:
        return {}
    return {
        "properties": {each: {} for each in parameters},
        "required": [each for each, is_required in parameters.items() if is_required],
        "additionalProperties": False,
    }


def _find_other_type(params: Mapping[str, Any], unknown: Collection[str]) -> str | None:
    """Return the only schedule that accepts all parameters, if the block's type lacks most of them.

    Args:
        params: parameters of the block.
        unknown: parameters that the type of the block does not have.
    """
    if len(unknown) < _MIN_UNKNOWN or 2 * len(unknown) <= len(params):
        return None
    found = [
        name
        for name, cls in SCHEDULES.items()
        if params.keys() <= read_fields(cls).keys()
        and all(key in params for key, field in read_fields(cls).items() if field.required)
    ]
    return found[0] if len(found) == 1 else None


def _suggest_schedules(problem: Problem) -> Problem:
    """Return a copy of a problem, with a hint that lists schedules that accept the unknown key.

    Return the problem unchanged if its rule is not ``unknown-key``, if its hint already suggests
    a key, or if no schedule accepts the unknown key.
    """
    if problem.rule != "unknown-key" or "`" in problem.hint:
        return problem
    key = get_last_key(problem.pointer)
    owners = [name for name, cls in SCHEDULES.items() if key in read_fields(cls)]
    hint = f"It is a parameter of {', '.join(owners[:5])}."
    return dataclasses.replace(problem, hint=hint) if owners else problem


def construct_schedule(
    document: Document,
    config: Mapping[str, Any],
    unresolved: Collection[str],
    ranks: DataRanks | None,
    steps_per_epoch: int | None,
    pointer: str = "/scheduler",
) -> tuple[Schedule[Any] | None, list[Problem]]:
    """Construct the schedule of a ``scheduler`` block.

    Args:
        document: parsed config.
        config: config from which invalid values have been removed.
        unresolved: JSON pointers of invalid values and "auto" values.
        ranks: number of data-parallel ranks; None if unknown.
        steps_per_epoch: number of optimizer steps per epoch; None if unknown.
        pointer: JSON pointer of the block.

    Returns:
        Pair ``(schedule, problems)``. ``schedule`` is None if it cannot be constructed.
        ``problems`` contains the problems with the schedule's parameters or the run length. If any
        parameter is in ``unresolved``, ``problems`` is empty, because that parameter could have
        caused them.
    """
    block = _find_block(config, pointer)
    if not isinstance(block, Mapping) or "type" not in block:
        return None, []
    pointer, params = f"{pointer}/params", block.get("params", {})
    schedule = None
    problems = []
    try:
        schedule = from_config({"type": block["type"], "params": params})
        horizons = list_possible_horizons(schedule, config, ranks, steps_per_epoch)
        _resolve_in_any_run(schedule, horizons)
    except ScheduleError as error:
        problems += build_problems(document, error, pointer)
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


def build_problems(document: Document, error: ScheduleError, pointer: str) -> list[Problem]:
    """Convert the problems of a schedule into problems in the config.

    Args:
        document: parsed config.
        error: error that the schedule raised.
        pointer: JSON pointer of the schedule's parameters.
    """
    return [
        document.build_problem(
            "schedule",
            join_pointer(pointer, fault.field) if fault.field else pointer,
            fault.message,
        )
        for fault in error.problems
    ]


def _find_block(config: Any, pointer: str) -> Any:
    """Return the value at a JSON pointer, or None if a key of the pointer is absent."""
    for key in split_pointer(pointer):
        if isinstance(config, list):
            config = config[int(key)]
        elif isinstance(config, Mapping) and key in config:
            config = config[key]
        else:
            return None
    return config


def _resolve_in_any_run(schedule: Schedule[Any], horizons: Sequence[Horizon]) -> None:
    """Check that a schedule is valid for at least one possible run length.

    Raises:
        ScheduleError: a parameter is invalid for every possible length.
    """
    found: list[dict[str | None, ParameterProblem]] = []
    for horizon in horizons:
        try:
            schedule.resolve(horizon)
        except ScheduleError as error:  # one error per length
            found.append({problem.field: problem for problem in error.problems})
            if len(horizons) == 1:
                raise
        else:
            return
    first, *others = found
    problems = [first[field] for field in first if all(field in each for each in others)]
    for index, problem in enumerate(problems):
        if any(each[problem.field].message != problem.message for each in others):
            message = f"{problem.message} The step counts in this message are only examples; "
            message += "the problem occurs with any dataset and batch size."
            problems[index] = dataclasses.replace(problem, message=message)
    if problems:
        raise ScheduleError(schedule.type_name, problems)

"""All that is wrong with a config: first each value against its schema, then values together.

A later phase runs on the parts that the earlier one found right, so that nobody reads of the
consequences of a mistake beside the mistake.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import schemas
from engine.config.driven import resolved_if_known
from engine.config.parser import Document
from engine.config.pointers import pointer_to
from engine.config.rules import RULES, Checked
from engine.config.schema import (
    OPTIMIZERS,
    SCHEMA,
    Member,
    optimizer_members,
    optimizer_name,
    optimizer_schema,
    schedule_schema,
    walk,
)
from engine.config.structure import against_schema, meant_by, remarks, shown
from engine.config.suggestions import nearest
from engine.errors import Problem
from schedules import SCHEDULES, ScheduleError, from_config
from schedules.core.fields import fields_of
from schedules.core.registry import find

__all__ = ["check"]

SEVERITIES = ("error", "warning", "note")


def check(document: Document, world_size: int | None, *, runs: bool = False) -> list[Problem]:
    """Return every problem of a document, sorted by place.

    Args:
        document: the parsed config.
        world_size: number of ranks to prove the batch sizes for; None proves what holds for any.
        runs: whether the config is to run as it is, so that nobody comes to fill in an "auto".
    """
    problems = list(document.problems)
    if not any(problem.rule == "syntax" for problem in problems):
        unread = {problem.pointer for problem in problems if problem.severity == "error"} - {""}
        problems += [
            problem
            for problem in _check_values(document, world_size, runs=runs)
            if problem.pointer not in unread
        ]
    return sorted(
        problems,
        key=lambda found: (
            found.line,
            found.column,
            SEVERITIES.index(found.severity),
            found.pointer,
        ),
    )


def _check_values(document: Document, world_size: int | None, *, runs: bool) -> Iterator[Problem]:
    config = document.value
    if not isinstance(config, dict):
        message = f"a config must be a JSON object, but is {shown(config)} instead."
        yield document.problem("wrong-type", "", message)
        return
    schema = schemas.read(SCHEMA)
    wrong = list(against_schema(document, config, schema))
    pointers = frozenset(problem.pointer for problem in wrong) - {""}
    parts = _without(config, pointers)
    members = list(walk(parts, schema))
    for key, of_params in (("optimizer", _check_optimizer), ("scheduler", _check_scheduler)):
        block = parts.get(key)
        if isinstance(block, dict) and "type" in block and f"/{key}/params" not in pointers:
            wrong += of_params(document, parts, members)
    yield from wrong
    yield from remarks(document, config, schema)
    autos = [member for member in members if member.value == "auto" and "x-auto" in member.schema]
    if runs:
        yield from _unresolved(document, autos)
    errors = [problem for problem in wrong if problem.severity == "error"]
    unsure = {member.pointer for member in autos}
    unsure |= {found for problem in errors for found in (problem.pointer, meant_by(problem))} - {""}
    right = _without(parts, frozenset(unsure))
    checked = Checked(document, right, members, frozenset(unsure), world_size)
    for rule in RULES:
        yield from rule(checked)


def _unresolved(document: Document, autos: list[Member]) -> Iterator[Problem]:
    for pointer, _, schema in autos:
        name = ".".join(pointer.split("/")[1:])
        who = schema["x-auto"].replace(", ", " and ")
        message = f'`{name}` must have a value, but is "auto", which {who} would have to fill in.'
        hint = "Write the value, or start the run from there."
        yield document.problem("unresolved-auto", pointer, message, hint)


def _without(value: Any, pointers: frozenset[str], pointer: str = "") -> Any:
    """Return a copy without the members at some pointers, and what is left of their objects."""
    if not isinstance(value, dict):
        return value
    return {
        key: _without(below, pointers, pointer_to(pointer, key))
        for key, below in value.items()
        if pointer_to(pointer, key) not in pointers
    }


def _check_optimizer(
    document: Document, config: Mapping[str, Any], members: list[Member]
) -> Iterator[Problem]:
    block = config["optimizer"]
    name = optimizer_name(block["type"])
    if name is None:
        near = nearest(block["type"], OPTIMIZERS)
        hint = f"Did you mean `{near}`?" if near else "Pass any other to `initialize(optimizer=…)`."
        message = (
            f"`optimizer.type` must be one of {', '.join(_usable_optimizers())}, "
            f"but is {shown(block['type'])} instead."
        )
        yield document.problem("unknown-optimizer", "/optimizer/type", message, hint)
        return
    schema = optimizer_schema(name)
    if "x-removed" in schema:
        message = f"`optimizer.type` {name} was removed from DeepSpeed in {schema['x-removed']}."
        yield document.problem("removed-key", "/optimizer/type", message, schema["x-instead"])
        return
    params = block.get("params", {})
    yield from against_schema(document, params, schema, "/optimizer/params")
    members += optimizer_members(block)


def _usable_optimizers() -> Iterator[str]:
    return (name for name, schema in OPTIMIZERS.items() if "x-removed" not in schema)


def _check_scheduler(
    document: Document, config: Mapping[str, Any], members: list[Member]
) -> Iterator[Problem]:
    block = config["scheduler"]
    name, params, pointer = block["type"], block.get("params", {}), "/scheduler/params"
    given = document.value["scheduler"].get("params", {})
    try:
        cls = find(name)
    except ValueError as error:
        yield document.problem("unknown-scheduler", "/scheduler/type", str(error))
        return
    schema = schedule_schema(cls)
    wrong = list(against_schema(document, params, schema, pointer))
    yield from _with_owners(wrong)
    members += walk(params, schema, pointer)
    if wrong or "auto" in params.values() or len(params) < len(given):
        return  # what "auto", or what is wrong, will be is not known here
    try:
        resolved_if_known(from_config({"type": name, "params": params}), config)
    except ScheduleError as error:
        for fault in error.faults:
            below = pointer_to(pointer, fault.field) if fault.field else pointer
            yield document.problem("schedule", below, fault.message)


def _with_owners(problems: list[Problem]) -> Iterator[Problem]:
    """Yield the problems, and say of a parameter of other schedules whose it is."""
    for problem in problems:
        key = problem.pointer.rpartition("/")[2]
        known = problem.rule != "unknown-key" or "`" in problem.hint
        owners = [] if known else [name for name, cls in SCHEDULES.items() if key in fields_of(cls)]
        if owners:
            hint = f"It is a parameter of {' and '.join(owners[:5])}."
            yield dataclasses.replace(problem, hint=hint)
        else:
            yield problem

"""All that is wrong with a config: first each value against its schema, then values together.

A later phase runs on the parts that the earlier one found right, so that nobody reads of the
consequences of a mistake beside the mistake.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
from referencing import Registry, Resource

import schemas
from engine.config import rules
from engine.config.document import Document
from engine.config.horizon import horizon_of
from engine.config.problems import Problem, pointer_to
from engine.config.sections import (
    OPTIMIZERS,
    SCHEMA,
    optimizer_name,
    optimizer_schema,
    schedule_schema,
)
from schedules import SCHEDULES, Schedule, ScheduleError, find, from_config
from schedules.fields import wanted
from schedules.registry import nearest

__all__ = ["check"]

_RANGE_KEYWORDS = {
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minItems",
    "maxItems",
}
_AUTO_HINT = (
    "Only the integrations that fill it in (transformers, accelerate) can run it; write the value."
)


def check(document: Document, world_size: int | None) -> list[Problem]:
    """Return every problem of a document, sorted by place.

    Args:
        document: the parsed config.
        world_size: number of ranks to prove the batch sizes for; None proves what holds for any.
    """
    problems = list(document.problems)
    if not any(problem.rule == "syntax" for problem in problems):
        unread = {problem.pointer for problem in problems}
        problems += [p for p in _check_values(document, world_size) if p.pointer not in unread]
    return sorted(problems, key=lambda found: (found.line, found.column, found.pointer))


def _check_values(document: Document, world_size: int | None) -> Iterator[Problem]:
    config = document.value
    if not isinstance(config, dict):
        message = f"a config must be a JSON object, but is {_shown(config)} instead."
        yield document.problem("wrong-type", "", message)
        return
    wrong = list(_against_schema(document, config, schemas.read(SCHEMA), ""))
    yield from wrong
    broken = {problem.pointer.split("/")[1] for problem in wrong if problem.pointer}
    parts = {key: value for key, value in config.items() if key not in broken}
    if "engine" in broken:
        parts.pop("scheduler", None)  # its durations cannot be proved against a broken run
    for key, check_params in (("optimizer", _check_optimizer), ("scheduler", _check_scheduler)):
        if key in parts:
            wrong = list(check_params(document, parts))
            yield from wrong
            if any(problem.severity == "error" for problem in wrong):
                del parts[key]
    yield from rules.check_together(document, parts, world_size, broken)


def _check_optimizer(document: Document, config: Mapping[str, Any]) -> Iterator[Problem]:
    block = config["optimizer"]
    name = optimizer_name(block["type"])
    if name is None:
        near = nearest(block["type"], OPTIMIZERS)
        hint = f"Did you mean `{near}`?" if near else "Pass any other to `initialize(optimizer=…)`."
        message = (
            f"`optimizer.type` must be one of {', '.join(OPTIMIZERS)}, "
            f"but is {_shown(block['type'])} instead."
        )
        yield document.problem("unknown-optimizer", "/optimizer/type", message, hint)
        return
    params = block.get("params", {})
    yield from _against_schema(document, params, optimizer_schema(name), "/optimizer/params")


def _check_scheduler(document: Document, config: Mapping[str, Any]) -> Iterator[Problem]:
    block = config["scheduler"]
    name, params, pointer = block["type"], block.get("params", {}), "/scheduler/params"
    try:
        cls = find(name)
    except ValueError as error:
        yield document.problem("unknown-scheduler", "/scheduler/type", str(error))
        return
    wrong = list(_against_schema(document, params, schedule_schema(cls), pointer))
    yield from wrong
    if wrong:
        return
    try:
        _resolve_if_known(from_config({"type": name, "params": params}), config)
    except ScheduleError as error:
        for fault in error.faults:
            below = pointer_to(pointer, fault.field) if fault.field else pointer
            yield document.problem("schedule", below, fault.message)


def _resolve_if_known(schedule: Schedule[Any], config: Mapping[str, Any]) -> None:
    """Prove durations against the run, as far as a file says how long it is.

    Only the loader knows an epoch and, where two of the three batch sizes are given, only the
    launch knows a batch: what needs one of them is proved when the run starts.
    """
    run = config.get("engine", {})
    texts = f"{run.get('max_duration')} {list(vars(schedule).values())}".lower()
    samples = config.get("train_batch_size")
    if re.search(r"\d\s*ep\b", texts) or (samples is None and re.search(r"\d\s*sp\b", texts)):
        return
    schedule.resolve(horizon_of(run, samples_per_step=samples, steps_per_epoch=None))


def _against_schema(
    document: Document, value: Any, schema: Mapping[str, Any], pointer: str
) -> Iterator[Problem]:
    registry: Registry[Any] = Registry(
        retrieve=lambda uri: Resource.from_contents(schemas.read(uri))  # type: ignore[call-arg]  # attrs field, renamed
    )
    validator = jsonschema.Draft202012Validator(schema, registry=registry)
    for error in validator.iter_errors(value):
        below = pointer
        for part in error.absolute_path:
            below = pointer_to(below, part)
        yield from _problems_of(document, error, below)


def _problems_of(
    document: Document, error: jsonschema.ValidationError, pointer: str
) -> Iterator[Problem]:
    name = ".".join(pointer.split("/")[1:]) or "the config"
    rule = str(error.validator)
    schema: Mapping[str, Any] = error.schema
    match rule:
        case "additionalProperties":
            known = schema["properties"]
            for key in error.instance:
                if key not in known and not key.startswith(("x-", "//")):
                    yield _unknown_key(document, pointer_to(pointer, key), key, known)
        case "required":
            missing = next(key for key in error.validator_value if key not in error.instance)
            takes = wanted(schema["properties"][missing])
            message = f"`{missing}` must be given in {name}, but is missing."
            yield document.problem("missing-key", pointer, message, f"It takes {takes}.")
        case _ if error.instance == "auto":
            message = f'`{name}` must be {wanted(schema)}, but is "auto" instead.'
            yield document.problem("unresolved-auto", pointer, message, _AUTO_HINT)
        case _ if rule in _RANGE_KEYWORDS | {"type", "enum", "pattern"}:
            message = f"`{name}` must be {wanted(schema)}, but is {_shown(error.instance)} instead."
            kind = "wrong-type" if rule == "type" else "out-of-range"
            yield document.problem(kind, pointer, message)
        case _:
            raise AssertionError(f"a schema uses {rule}, which has no message")


def _unknown_key(document: Document, pointer: str, key: str, known: Mapping[str, Any]) -> Problem:
    hint = 'A key that begins with "x-" is parked.'
    if near := nearest(key, known):
        hint = f"Did you mean `{near}`?"
    elif pointer.startswith("/scheduler/params/"):
        owners = [
            name for name in SCHEDULES if key in schedule_schema(SCHEDULES[name])["properties"]
        ]
        if owners:
            hint = f"It is a parameter of {' and '.join(owners)}."
    return document.problem(
        "unknown-key", pointer, f"`{key}` is no key that anything here reads.", hint, at_key=True
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "…"

"""Check each value of a config against its JSON schema, and construct the schedule."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import schemas
from engine.config.batch_sizes import DataRanks, RankCounter, count_data_ranks
from engine.config.optimizer_types import find_optimizer_schema
from engine.config.param_groups import check_param_groups, find_group_schedulers
from engine.config.parser import Document
from engine.config.pointers import get_last_key, get_parent, remove_keys
from engine.config.schedule_blocks import check_scheduler, construct_schedule
from engine.config.schedule_context import (
    POSSIBLE_LENGTHS,
    build_horizon,
    get_train_batch_size,
)
from engine.config.schema import (
    SCHEMA,
    Member,
    optimizer_name,
    walk,
)
from engine.config.violations import check_against_schema, get_suggested_pointer
from engine.errors import Fix, Problem
from schedules import Schedule

__all__ = ["Structure", "check_structure"]


@dataclass(frozen=True)
class Structure:
    """Result of checking each value of a config against its schema.

    This result is the input to the rules that check combinations of values.
    """

    problems: Sequence[Problem]
    config: Mapping[str, Any]
    """The config without invalid values and without "auto" values."""
    members: Sequence[Member]
    """The config's keys with their values and schemas, except keys that fail the schema check."""
    unresolved: Collection[str]
    """JSON pointers of invalid values, "auto" values and unknown keys. If a key is probably
    misspelled, the pointer of the correct key is also included."""
    schedule: Schedule[Any] | None
    """The schedule in ``config``; None if it is absent or cannot be constructed."""
    data_ranks: DataRanks | None
    """The number of data-parallel ranks; None if the world size is unknown."""
    steps_per_epoch: int | None
    """The number of optimizer steps per epoch; None if unknown."""
    group_schedules: Mapping[int, Schedule[Any]]
    """The schedules of individual param groups, by index in ``optimizer.param_groups``."""


def check_structure(
    document: Document,
    world_size: int | None,
    count_ranks: RankCounter = count_data_ranks,
    steps_per_epoch: int | None = None,
) -> Structure:
    """Check each value of a config against its schema, and construct the config's schedule.

    Args:
        document: parsed config; its top-level value must be a JSON object.
        world_size: number of ranks; None if unknown.
        count_ranks: function that takes the config and the world size, and returns the number of
            data-parallel ranks.
        steps_per_epoch: number of optimizer steps per epoch; None if unknown.
    """
    schema = schemas.read(SCHEMA)
    problems = list(check_against_schema(document, document.value, schema))
    invalid = {problem.pointer for problem in problems} - {""}
    config = remove_keys(document.value, invalid)
    members = list(walk(config, schema))
    ranks = None if world_size is None else count_ranks(config, world_size)
    for key, check_block in (("optimizer", _check_optimizer), ("scheduler", check_scheduler)):
        block = config.get(key)
        if isinstance(block, dict) and "type" in block and f"/{key}/params" not in invalid:
            problems += [each for each in check_block(document, block) if each not in problems]
    problems += _check_names(document)
    if not invalid & {"/engine", "/engine/max_duration", "/engine/scale_schedule_ratio"}:
        problems += _check_run_length(document, config, ranks, steps_per_epoch)
    unresolved = {
        each.pointer for each in members if each.value == "auto" and "x-auto" in each.schema
    }
    unresolved |= _get_error_pointers(problems)
    config = remove_keys(config, unresolved)
    known = (ranks, steps_per_epoch)
    schedule, from_schedule = construct_schedule(document, config, unresolved, *known)
    of_groups = {}
    for index, pointer, _ in find_group_schedulers(config):
        of_group, found = construct_schedule(document, config, unresolved, *known, pointer)
        from_schedule += found
        if of_group is not None:
            of_groups[index] = of_group
    problems += from_schedule
    unresolved |= _get_error_pointers(from_schedule)
    config = remove_keys(config, unresolved)
    return Structure(
        problems,
        config,
        members,
        frozenset(unresolved),
        schedule,
        *known,
        group_schedules=of_groups,
    )


def _get_error_pointers(problems: Sequence[Problem]) -> set[str]:
    errors = [problem for problem in problems if problem.severity == "error"]
    return {
        found for problem in errors for found in (problem.pointer, get_suggested_pointer(problem))
    } - {""}


def _check_names(document: Document) -> Iterator[Problem]:
    """Yield the problems with deprecated keys and aliases in the config.

    A deprecated key yields a note if its replacement is not set. A section that contains two names
    of the same key yields an error, because DeepSpeed rejects such a config.
    """
    for member in walk(document.value, schemas.read(SCHEMA)):
        name, parent = get_last_key(member.pointer), get_parent(member.pointer)
        siblings = document.get_value(parent)
        other = member.schema.get("x-alias-of")
        if other in siblings and "auto" not in (member.value, siblings[other]):
            yield document.build_problem(
                "duplicate-key",
                member.pointer,
                f"`{name}` must not be set together with `{other}`, because both are names of the "
                "same key.",
                "Remove one of the two keys.",
                at_key=True,
            )
        if not member.schema.get("deprecated"):
            continue
        instead = member.schema.get("x-instead", "")
        # DeepSpeed checks this in the sections, but not for the keys at the top.
        replacement = instead.split(".")[0]
        values = (member.value, siblings.get(replacement, "auto"))
        if parent and "auto" not in values:
            yield document.build_problem(
                "deprecated-key",
                member.pointer,
                f"`{name}` must not be set together with `{replacement}`, because DeepSpeed "
                "rejects such a config.",
                f"Remove `{name}`, which is deprecated in favor of `{instead}`.",
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
        return
    yield from check_against_schema(document, block.get("params", {}), found, "/optimizer/params")
    name = optimizer_name(block["type"])
    assert name is not None
    yield from check_param_groups(document, name, block.get("param_groups"))


def _check_run_length(
    document: Document,
    config: Mapping[str, Any],
    ranks: DataRanks | None,
    steps_per_epoch: int | None,
) -> Iterator[Problem]:
    """Yield an error if the run is shorter than one step or longer than 2**53 steps.

    If the number of steps per epoch is unknown, yield an error only if the length is invalid for
    every number in `POSSIBLE_LENGTHS`.
    """
    run, samples = config.get("engine", {}), get_train_batch_size(config, ranks) or 1
    message = ""
    for steps in POSSIBLE_LENGTHS if steps_per_epoch is None else (steps_per_epoch,):
        try:
            build_horizon(run, samples_per_step=samples, steps_per_epoch=steps)
        except ValueError as error:
            message = str(error)
        else:
            return
    yield document.build_problem("out-of-range", "/engine/max_duration", message)

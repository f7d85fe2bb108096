"""Validate a config in three phases: check its syntax, each value, and combinations of values.

Each phase skips values that an earlier phase rejected, so each mistake is reported only once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from engine.config.batch_sizes import RankCounter, count_data_ranks
from engine.config.deepspeed_values import convert_numbers_to_booleans, drop_nulls
from engine.config.other_formats import recognize_keys
from engine.config.parser import Document
from engine.config.pointers import dotted_name
from engine.config.rules import RULES, RuleContext
from engine.config.schema import means_default
from engine.config.source import Source, load_document
from engine.config.structure import check_structure
from engine.config.wording import quote_value
from engine.errors import Problem
from schedules.core.imports import imports_allowed

__all__ = ["check", "examine", "validate"]

SEVERITIES = ("error", "warning", "note")


def validate(
    config: Source,
    *,
    world_size: int | None = None,
    steps_per_epoch: int | None = None,
    allow_imports: bool = False,
) -> list[Problem]:
    """Validate a config, and return its problems, sorted by line and column.

    The config is valid if no problem has the severity "error".

    Args:
        config: path of the config, or the config as a dict.
        world_size: number of ranks, used to validate the batch sizes. If None, the batch sizes must
            be valid for at least one number of ranks.
        steps_per_epoch: number of optimizer steps per epoch, used to validate durations in epochs.
            If None, these durations must be valid for at least one number of steps per epoch.
        allow_imports: whether to import and check the code that the config names, such as
            ``"my_module:MySchedule"``. Importing runs the code, so allow imports only for a trusted
            config.

    Raises:
        ConfigError: the file cannot be read, is too large or is not UTF-8 text.

    >>> [problem.rule for problem in validate({"train_batch_size": 8, "sheduler": {}})]
    ['unknown-key']
    """
    return check(
        load_document(config),
        world_size,
        steps_per_epoch=steps_per_epoch,
        allow_imports=allow_imports,
    )


def check(
    document: Document,
    world_size: int | None,
    *,
    steps_per_epoch: int | None = None,
    reject_auto: bool = False,
    allow_imports: bool = False,
) -> list[Problem]:
    """Validate a parsed config, and return its problems, sorted by line and column.

    For the arguments, see `examine`.
    """
    problems, _ = examine(
        document,
        world_size,
        steps_per_epoch=steps_per_epoch,
        reject_auto=reject_auto,
        allow_imports=allow_imports,
    )
    return problems


def examine(
    document: Document,
    world_size: int | None,
    *,
    steps_per_epoch: int | None = None,
    reject_auto: bool = False,
    needs_deepspeed: str | None = None,
    count_ranks: RankCounter = count_data_ranks,
    allow_imports: bool = False,
) -> tuple[list[Problem], RuleContext | None]:
    """Validate a parsed config, and return its problems and its valid values.

    Args:
        document: parsed config.
        world_size: number of ranks, used to validate the batch sizes. If None, the batch sizes must
            be valid for at least one number of ranks.
        steps_per_epoch: number of optimizer steps per epoch, used to validate durations in epochs.
            If None, these durations must be valid for at least one number of steps per epoch.
        reject_auto: whether to report an error for each "auto" that only an integration, such as
            the Hugging Face Trainer, can replace. Set this if no integration is used.
        needs_deepspeed: name of the model feature or `initialize` argument that requires
            DeepSpeed; None if there is none.
        count_ranks: function that takes the config and the world size, and returns the number of
            data-parallel ranks.
        allow_imports: whether to import and check the code that the config names.

    Returns:
        The problems, sorted by line and column, and the `RuleContext` with the valid values. The
        context is None if the syntax is invalid, the config is not a JSON object, or it is in
        another tool's format.
    """
    problems = list(document.problems)
    context = None
    if not any(problem.rule == "syntax" for problem in problems):
        invalid = {problem.pointer for problem in problems if problem.severity == "error"} - {""}
        with imports_allowed(allow_imports):
            found, context = _examine_values(
                document,
                world_size,
                steps_per_epoch,
                needs_deepspeed,
                count_ranks,
                reject_auto=reject_auto,
            )
        problems += [problem for problem in found if problem.pointer not in invalid]
    return sorted(problems, key=_sort_key), context


def _sort_key(problem: Problem) -> tuple[int, int, int, str]:
    severity = SEVERITIES.index(problem.severity)
    return problem.line, problem.column, severity, problem.pointer


def _examine_values(
    document: Document,
    world_size: int | None,
    steps_per_epoch: int | None,
    needs_deepspeed: str | None,
    count_ranks: RankCounter,
    *,
    reject_auto: bool,
) -> tuple[Iterable[Problem], RuleContext | None]:
    if not isinstance(document.value, dict):
        message = f"The config must be a JSON object, got {quote_value(document.value)}."
        return [document.build_problem("wrong-type", "", message)], None
    if other := recognize_keys(document.value):
        return [document.build_problem("other-format", "", *other)], None
    document, dropped = drop_nulls(document)
    document, converted = convert_numbers_to_booleans(document)
    structure = check_structure(document, world_size, count_ranks, steps_per_epoch)
    context = RuleContext(document, structure, world_size, needs_deepspeed)
    autos = _find_unresolved(context) if reject_auto else ()
    from_rules = (problem for rule in RULES for problem in rule(context))
    return [*dropped, *converted, *structure.problems, *autos, *from_rules], context


def _find_unresolved(context: RuleContext) -> Iterator[Problem]:
    for member in context.members:
        is_auto = member.value == "auto" and "x-auto" in member.schema
        if is_auto and not means_default(member.pointer, member.value):
            name, who = dotted_name(member.pointer), member.schema["x-auto"].replace(", ", " or ")
            message = f'`{name}` must be set, got "auto", which only {who} can replace.'
            hint = f"Set a value, or start the run with {who}."
            yield context.error("unresolved-auto", member.pointer, message, hint)

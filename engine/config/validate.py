"""Validate a config: its text, then each value against its schema, then values together.

A later phase sees only what the earlier ones accepted, so that nobody reads about the consequences
of a mistake beside the mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from engine.config.parser import Document
from engine.config.pointers import dotted_name
from engine.config.rules import RULES, RuleContext
from engine.config.source import Source, load_document
from engine.config.structure import check_structure
from engine.config.wording import quote_value
from engine.errors import Problem

__all__ = ["check", "examine", "validate"]

SEVERITIES = ("error", "warning", "note")


def validate(config: Source, *, world_size: int | None = None) -> list[Problem]:
    """Return all problems of a config, in the order of their places; none if it is valid.

    Args:
        config: path, or the config as a dict.
        world_size: number of ranks to check the batch sizes for; None checks what holds for any.

    Raises:
        ConfigError: the file does not exist or is not text.

    >>> [problem.rule for problem in validate({"train_batch_size": 8, "sheduler": {}})]
    ['unknown-key']
    """
    return check(load_document(config), world_size)


def check(document: Document, world_size: int | None, *, runs: bool = False) -> list[Problem]:
    """Return every problem of a document, sorted by place; see `examine`."""
    return examine(document, world_size, runs=runs)[0]


def examine(
    document: Document, world_size: int | None, *, runs: bool = False
) -> tuple[list[Problem], RuleContext | None]:
    """Return every problem of a document, sorted by place, and its valid part.

    Args:
        document: parsed config.
        world_size: number of ranks to check the batch sizes for; None checks what holds for any.
        runs: whether the config runs as it is, so that no integration fills in an "auto".

    Returns:
        The problems, and what the rules saw of the config; None if it is not even an object.
    """
    problems = list(document.problems)
    context = None
    if not any(problem.rule == "syntax" for problem in problems):
        unread = {problem.pointer for problem in problems if problem.severity == "error"} - {""}
        found, context = _examine_values(document, world_size, runs=runs)
        problems += [problem for problem in found if problem.pointer not in unread]
    return sorted(problems, key=_place), context


def _place(problem: Problem) -> tuple[int, int, int, str]:
    severity = SEVERITIES.index(problem.severity)
    return problem.line, problem.column, severity, problem.pointer


def _examine_values(
    document: Document, world_size: int | None, *, runs: bool
) -> tuple[Iterable[Problem], RuleContext | None]:
    if not isinstance(document.value, dict):
        message = f"a config must be a JSON object, but is {quote_value(document.value)} instead."
        return [document.problem("wrong-type", "", message)], None
    structure = check_structure(document)
    context = RuleContext(document, structure, world_size)
    autos = _find_unresolved(context) if runs else ()
    of_rules = (problem for rule in RULES for problem in rule(context))
    return [*structure.problems, *autos, *of_rules], context


def _find_unresolved(context: RuleContext) -> Iterator[Problem]:
    for member in context.members:
        if member.value == "auto" and "x-auto" in member.schema:
            name, who = dotted_name(member.pointer), member.schema["x-auto"].replace(", ", " and ")
            message = (
                f'`{name}` must have a value, but is "auto", which {who} would have to fill in.'
            )
            hint = "Write the value, or start the run from there."
            yield context.error("unresolved-auto", member.pointer, message, hint)

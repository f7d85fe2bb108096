"""Validate the config in the web editor, and compute the data that the editor shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.config import ConfigError, Problem
from engine.config.edits import find_fix_edits
from engine.config.parser import Document, parse
from engine.config.pointers import get_parent
from engine.config.rules import RuleContext
from engine.config.suggestions import suggest_optimizer
from engine.config.validate import examine
from engine.config.wording import count_noun
from engine.errors import Fix
from engine.ui.cursor import to_utf16
from engine.ui.curves import CurveSet, compute_curves
from engine.ui.form import build_form
from engine.ui.memory import describe_memory
from engine.ui.replies import Numbers
from engine.ui.settings import RunSettings, find_batch_sizes
from schedules import SCHEDULES
from schedules.core.spelling import find_nearest

__all__ = ["analyze", "compute_for_text"]

_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[^\s{}\[\],:"]+')
_MAX_PROBLEMS = 200


def analyze(
    text: str,
    name: str,
    settings: RunSettings,
    compared: Sequence[Mapping[str, Any]] = (),
    window: tuple[int, int] | None = None,
) -> Numbers:
    """Validate a config, and compute the curves, form, memory estimate and derived values to show.

    Args:
        text: text of the config.
        name: file name to show in messages.
        settings: run settings that the user entered on the config page.
        compared: other configs and schedules to draw for comparison; see `compute_curves`.
        window: first and last step to draw; None for all steps.
    """
    document = parse(text, name)
    examined, steps_per_epoch = _examine(document, settings)
    problems, context = examined
    facts = [] if context is None else _list_facts(context)
    header: dict[str, Any] = {
        "problems": _describe_problems(document, problems),
        "summary": _summarize(problems, settings.world_size),
        "facts": facts,
        "form": build_form(document),
        "memory": describe_memory(context, problems, settings),
        "stepsPerEpoch": steps_per_epoch,
        "curves": None,
        "curvesError": "",
    }
    try:
        curves = compute_curves(
            document,
            settings,
            examined=examined,
            steps_per_epoch=steps_per_epoch,
            compared=compared,
        )
    except ConfigError as error:
        messages = [str(problem) for problem in error.problems]
        prefix = "" if error.name == name else f"{error.name}: "
        return Numbers({**header, "curvesError": prefix + " ".join(messages[:1])})
    except ValueError as error:
        return Numbers({**header, "curvesError": str(error)})
    steps = curves.select_steps(window)
    facts += _describe_auto_values(curves)
    header["curves"] = curves.to_json(steps)
    values = list(curves.evaluate(steps))
    return Numbers(header, [steps, *values] if header["curves"]["isSampled"] else values)


def compute_for_text(
    text: str, name: str, settings: RunSettings, compared: Sequence[Mapping[str, Any]]
) -> CurveSet:
    """Compute the curves of a config and of the configs and schedules in ``compared``.

    Raises:
        ConfigError: the schedule of one of the configs is invalid.
        ValueError: there are too many steps or curves.
    """
    document = parse(text, name)
    examined, steps_per_epoch = _examine(document, settings)
    return compute_curves(
        document,
        settings,
        examined=examined,
        steps_per_epoch=steps_per_epoch,
        compared=compared,
    )


def _examine(
    document: Document, settings: RunSettings
) -> tuple[tuple[list[Problem], RuleContext | None], int | None]:
    """Validate a config, and return the result with the number of steps per epoch.

    The number can depend on the batch size, which is known only after a first validation.
    """
    given = settings.steps_per_epoch
    examined = examine(document, settings.world_size, steps_per_epoch=given)
    found = _count_steps_per_epoch(examined[1], settings)
    if found != given:
        examined = examine(document, settings.world_size, steps_per_epoch=found)
    return examined, found


def _count_steps_per_epoch(context: RuleContext | None, settings: RunSettings) -> int | None:
    if context is None:
        return settings.steps_per_epoch
    batch = find_batch_sizes(context.config, context.data_ranks)
    return settings.count_steps_per_epoch(context.config, batch)


def _describe_problems(document: Document, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return each problem with its position in the editor and the edit that fixes it, if any."""
    text = document.text
    offered = [_offer_fix(document, problem) for problem in problems[:_MAX_PROBLEMS]]
    edits = {id(edit.problem): edit for edit in find_fix_edits(document, offered)}
    described = []
    for problem in offered:
        start, end = _find_range(document, problem)
        edit = edits.get(id(problem))
        fix = None
        if edit is not None:
            verb = "Rename to" if problem.fix is not None and problem.fix.key else "Change to"
            fix = {
                "label": f"{verb} {edit.text}",
                "from": to_utf16(text, edit.start),
                "to": to_utf16(text, edit.end),
                "insert": edit.text,
            }
        described.append(
            {
                "rule": problem.rule,
                "severity": problem.severity,
                "line": problem.line,
                "column": problem.column,
                "message": problem.message,
                "hint": problem.hint,
                "from": to_utf16(text, start),
                "to": to_utf16(text, end),
                "fix": fix,
            }
        )
    return described


def _offer_fix(document: Document, problem: Problem) -> Problem:
    """Add a fix to a problem about a misspelled name, unless the problem already has a fix.

    The fix replaces the name with the most similar known name, if there is one.
    """
    if problem.fix is not None or problem.pointer not in document.locations:
        return problem
    if problem.rule == "unknown-key":
        is_key = problem.suggestion and not problem.suggestion.startswith("/")
        return replace(problem, fix=Fix(key=problem.suggestion)) if is_key else problem
    near = None
    if problem.rule in {"unknown-optimizer", "unknown-scheduler"}:
        name = str(document.get_value(problem.pointer))
        is_optimizer = problem.rule == "unknown-optimizer"
        near = suggest_optimizer(name) if is_optimizer else find_nearest(name, SCHEDULES)
    return problem if near is None else replace(problem, fix=Fix(value=near))


def _find_range(document: Document, problem: Problem) -> tuple[int, int]:
    """Return the range of the token to underline for a problem.

    If the invalid value is an object or an array, the token is its key.
    """
    text = document.text
    if not problem.line:
        return 0, min(1, len(text))
    start = min(document.get_offset((problem.line, problem.column)), len(text))
    if text[start : start + 1] in {"{", "["}:
        around = problem.pointer
        while around and around not in document.locations:
            around = get_parent(around)
        if around:
            start = document.get_offset(document.locations[around].key)
    token = _TOKEN.match(text, start)
    return start, token.end() if token else min(start + 1, len(text))


def _summarize(problems: Sequence[Problem], world_size: int | None) -> str:
    counts = [
        count_noun(number, severity)
        for severity in ("error", "warning", "note")
        if (number := sum(problem.severity == severity for problem in problems))
    ]
    if any(problem.severity == "error" for problem in problems):
        return ", ".join(counts)
    ranks = f" for {count_noun(world_size, 'rank')}" if world_size else ""
    return ", ".join((f"Valid{ranks}", *counts))


def _list_facts(context: RuleContext) -> list[dict[str, str]]:
    backend = context.backend
    facts = [{"label": "Backend", "value": backend.name, "detail": backend.reason}]
    batch = find_batch_sizes(context.config, context.data_ranks)
    if batch is not None:
        facts.append({"label": "Batch", "value": str(batch.train), "detail": str(batch)})
    return facts


def _describe_auto_values(curves: CurveSet) -> list[dict[str, str]]:
    values = curves.preview.auto_values
    shown = ", ".join(f"{name} {value}" for name, value in values.items())
    detail = "The curves use these values instead of auto."
    return [{"label": "auto", "value": shown, "detail": detail}] if shown else []

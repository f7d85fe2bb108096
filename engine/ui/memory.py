"""Estimate the memory of the model states for the config in the editor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.config import Problem
from engine.config.rules import RuleContext
from engine.display.memory_table import build_tables, describe_run, list_notes
from engine.memory import ParameterSize, read_settings
from engine.memory.alternatives import list_alternatives
from engine.ui.settings import RunSettings

__all__ = ["describe_memory"]


def describe_memory(
    context: RuleContext | None, problems: Sequence[Problem], settings: RunSettings
) -> dict[str, Any] | None:
    """Return the memory estimates of ``onecycle memory`` for the config page.

    Args:
        context: validated config values; None if the config is not a JSON object.
        problems: problems of the config.
        settings: run settings that the user entered. Without a world size, one rank is assumed.

    Returns:
        A dict with the keys ``summary``, ``tables`` and ``notes``, or None if the number of
        parameters is unknown or the config has errors. If the memory cannot be estimated,
        ``summary`` gives the reason, and the other values are empty.
    """
    has_errors = any(problem.severity == "error" for problem in problems)
    if settings.parameters is None or context is None or has_errors:
        return None
    model = [ParameterSize((settings.parameters,))]
    try:
        run = read_settings(context, settings.world_size or 1)
    except ValueError as error:
        return {"summary": str(error), "tables": [], "notes": []}
    return {
        "summary": describe_run(model, run),
        "tables": [table._asdict() for table in build_tables([*list_alternatives(model, run)])],
        "notes": list(list_notes(run)),
    }

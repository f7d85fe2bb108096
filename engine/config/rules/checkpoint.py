"""Rules for ``engine.checkpoint``.

They report keys that have no effect without ``dir``, and an interval that is too large.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Rule, RuleContext
from engine.errors import Problem
from schedules.core.durations import DurationError, Horizon, convert_to_steps

__all__ = ["RULES"]

_POINTER = "/engine/checkpoint"


def _check_directory(context: RuleContext) -> Iterator[Problem]:
    plan = context.get_section("engine").get("checkpoint", {})
    if plan.get("dir") is not None or not context.is_absent(f"{_POINTER}/dir"):
        return
    for key in ("every", "keep", "keep_every", "resume", "best"):
        if plan.get(key) is not None and plan[key] != "never":
            message = f"`engine.checkpoint.{key}` has no effect without `engine.checkpoint.dir`."
            hint = 'Add "dir": "checkpoints", or remove the key and save checkpoints in the script.'
            yield context.error("checkpoint-without-dir", f"{_POINTER}/{key}", message, hint)
            return


def _check_interval(context: RuleContext) -> Iterator[Problem]:
    every = context.get_section("engine").get("checkpoint", {}).get("every")
    if every is None:
        return
    try:
        convert_to_steps(every, Horizon(steps_per_epoch=1, samples_per_step=1), scaled=False)
    except DurationError as error:
        message = f"`engine.checkpoint.every`: {error}"
        yield context.error("out-of-range", f"{_POINTER}/every", message)


RULES: tuple[Rule, ...] = (_check_directory, _check_interval)

"""Rule for ``engine.checkpoint``.

It reports keys that have no effect without ``dir``.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Rule, RuleContext
from engine.errors import Problem

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


RULES: tuple[Rule, ...] = (_check_directory,)

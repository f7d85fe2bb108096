"""The section ``engine.checkpoint``: keys that come to nothing."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Rule, RuleContext
from engine.errors import Problem

__all__ = ["RULES"]

_PLACE = "/engine/checkpoint"


def _without_dir(context: RuleContext) -> Iterator[Problem]:
    plan = context.section("engine").get("checkpoint", {})
    if plan.get("dir") is not None or not context.lacks(f"{_PLACE}/dir"):
        return
    for key in ("every", "keep", "keep_every", "resume"):
        if plan.get(key) is not None and plan[key] != "never":
            message = (
                f"`engine.checkpoint.{key}` must go with `dir`, the folder of the checkpoints, but "
                "there is none: nothing would be saved, nor gone on from."
            )
            hint = 'Add "dir": "checkpoints", or leave saving to the script and remove the key.'
            yield context.error("checkpoint-without-dir", f"{_PLACE}/{key}", message, hint)
            return


RULES: tuple[Rule, ...] = (_without_dir,)

"""Rule for ``engine.dataloader``.

If ``num_workers`` is 0, it rejects settings that require workers.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Rule, RuleContext
from engine.errors import Problem

__all__ = ["RULES"]

_POINTER = "/engine/dataloader"


def _check_workers(context: RuleContext) -> Iterator[Problem]:
    settings = context.get_section("engine").get("dataloader", {})
    if settings.get("num_workers") or not (
        settings.get("num_workers") == 0 or context.is_absent(f"{_POINTER}/num_workers")
    ):
        return
    for key in ("prefetch_factor", "persistent_workers"):
        if settings.get(key):
            message = f"`engine.dataloader.{key}` requires `num_workers` >= 1, got 0."
            hint = f'Set "num_workers" to 1 or more, or remove "{key}".'
            yield context.error("dataloader-without-workers", f"{_POINTER}/{key}", message, hint)


RULES: tuple[Rule, ...] = (_check_workers,)

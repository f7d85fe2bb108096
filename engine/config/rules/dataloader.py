"""Rules for the data: ``engine.dataloader`` and ``data_efficiency``.

They report settings that require workers although there are none, and missing keys.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Rule, RuleContext
from engine.errors import Problem

__all__ = ["RULES"]

_POINTER = "/engine/dataloader"
_SAMPLING = "/data_efficiency/data_sampling"


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


def _check_data_efficiency(context: RuleContext) -> Iterator[Problem]:
    sampling = context.get_section("data_efficiency").get("data_sampling", {})
    for name, key, example in (
        ("curriculum_learning", "curriculum_metrics", "an object that describes each metric"),
        ("dynamic_batching", "max_tokens", "a number of tokens per micro-batch"),
    ):
        pointer = f"{_SAMPLING}/{name}"
        section = sampling.get(name, {})
        if section.get("enabled") is True and context.is_absent(f"{pointer}/{key}"):
            message = f"`{name}.{key}` must be set if `{name}.enabled` is true."
            hint = f'Add "{key}": {example}.'
            yield context.error("missing-key", pointer, message, hint)


RULES: tuple[Rule, ...] = (_check_workers, _check_data_efficiency)

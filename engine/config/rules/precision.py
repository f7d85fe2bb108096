"""Rules for mixed precision: report keys that conflict with each other or require ZeRO."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Rule, RuleContext
from engine.errors import Problem

__all__ = ["RULES"]

_NAMES = ("fp16", "bf16", "bfloat16", "torch_autocast")


def _check_single_precision(context: RuleContext) -> Iterator[Problem]:
    on = [name for name in _NAMES if context.is_enabled(name)]
    if len(on) > 1:
        both = " and ".join(f"`{name}.enabled`" for name in on)
        message = f"Only one precision can be enabled, but {both} are true."
        yield context.error(
            "precision", f"/{on[0]}/enabled", message, "Set all but one of these keys to false."
        )
    if "bf16" in context.config and "bfloat16" in context.config:
        message = "The config has both `bf16` and its deprecated name `bfloat16`."
        yield context.error("precision", "/bfloat16", message, "Remove the section `bfloat16`.")


def _check_master_weights(context: RuleContext) -> Iterator[Problem]:
    for name, key in (
        ("fp16", "fp16_master_weights_and_grads"),
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
    ):
        if context.get_section(name).get(key) is True and context.stage == 0:
            message = f"`{name}.{key}` requires ZeRO stage 1, 2 or 3, got stage 0."
            hint = 'Set "zero_optimization": {"stage": 1}, or remove the key.'
            yield context.error("precision", f"/{name}/{key}", message, hint)


RULES: tuple[Rule, ...] = (_check_single_precision, _check_master_weights)

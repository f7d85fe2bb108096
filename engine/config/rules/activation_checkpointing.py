"""Rule that checks the keys that ``contiguous_memory_optimization`` requires."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Rule, RuleContext
from engine.errors import Problem

__all__ = ["RULES"]

_KEY = "contiguous_memory_optimization"
_REQUIRED = ("partition_activations", "number_checkpoints")
_POINTER = f"/activation_checkpointing/{_KEY}"


def _check_contiguous_memory(context: RuleContext) -> Iterator[Problem]:
    section = context.get_section("activation_checkpointing")
    if section.get(_KEY) is not True:
        return
    partition, number = (f"/activation_checkpointing/{key}" for key in _REQUIRED)
    if section.get("partition_activations") is False or context.is_absent(partition):
        message = f"`{_KEY}` requires `partition_activations`, which is not enabled."
        hint = f'Set "partition_activations": true, or remove `{_KEY}`.'
        yield context.error("contiguous-without-partition", _POINTER, message, hint)
    elif not section.get("number_checkpoints") and number not in context.unresolved:
        message = (
            f"`{_KEY}` requires `number_checkpoints`. Set `number_checkpoints`, or pass "
            "`num_checkpoints` to `deepspeed.checkpointing.configure` in the script."
        )
        yield context.note("contiguous-without-number", _POINTER, message)


RULES: tuple[Rule, ...] = (_check_contiguous_memory,)

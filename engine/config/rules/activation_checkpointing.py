"""Activation checkpointing: keys that need one another."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Checked, Rule
from engine.errors import Problem

__all__ = ["RULES"]

_KEY = "contiguous_memory_optimization"
_BESIDE = ("partition_activations", "number_checkpoints")
_PLACE = f"/activation_checkpointing/{_KEY}"


def _contiguous_memory(checked: Checked) -> Iterator[Problem]:
    section = checked.section("activation_checkpointing")
    if section.get(_KEY) is not True:
        return
    partition, number = (f"/activation_checkpointing/{key}" for key in _BESIDE)
    if section.get("partition_activations") is False or checked.lacks(partition):
        message = f"`{_KEY}` must go with `partition_activations`, but that is not true."
        hint = f'Set "partition_activations": true, or remove `{_KEY}`.'
        yield checked.error("contiguous-without-partition", _PLACE, message, hint)
    elif not section.get("number_checkpoints") and number not in checked.unsure:
        message = f"`{_KEY}` needs `number_checkpoints`, here or from the script."
        yield checked.note("contiguous-without-number", _PLACE, message)


RULES: tuple[Rule, ...] = (_contiguous_memory,)

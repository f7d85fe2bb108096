"""The backend that runs a config, and the reason for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.config.pointers import dotted_name, is_within
from engine.config.schema import Member

__all__ = ["BackendChoice", "choose_backend", "find_deepspeed_only", "zero_stage"]


class BackendChoice(NamedTuple):
    """The backend, "torch" or "deepspeed", and the reason in words."""

    name: str
    reason: str


def zero_stage(config: Mapping[str, Any]) -> int | str:
    """Return the ZeRO stage of a config, 0 by default; it may be "auto".

    >>> zero_stage({"zero_optimization": True}), zero_stage({"zero_optimization": {"stage": 2}})
    (1, 2)
    """
    section = config.get("zero_optimization", {})
    stage: int | str = int(section) if isinstance(section, bool) else section.get("stage", 0)
    return stage


def find_deepspeed_only(members: Sequence[Member]) -> list[Member]:
    """Return the keys that only DeepSpeed supports, without the keys inside of them."""
    found: list[Member] = []
    for member in members:
        inside = found and is_within(member.pointer, [found[-1].pointer])
        if member.schema.get("x-backend") == "deepspeed" and not inside:
            found.append(member)
    return found


def choose_backend(config: Mapping[str, Any], members: Sequence[Member]) -> BackendChoice:
    """Return the backend of a config: the one that it names, or the one that supports its keys.

    >>> choose_backend({"train_batch_size": 8}, []).name
    'torch'
    """
    named = config.get("engine", {}).get("backend", "auto")
    if named != "auto":
        return BackendChoice(named, "`engine.backend` says so")
    keys = [dotted_name(member.pointer) for member in find_deepspeed_only(members)]
    if zero_stage(config) not in {0, "auto"}:
        is_old = isinstance(config["zero_optimization"], bool)
        keys.insert(0, "zero_optimization" if is_old else "zero_optimization.stage")
    if keys:
        verb = "means" if len(keys) == 1 else "mean"
        return BackendChoice("deepspeed", f"{', '.join(keys[:3])} {verb} DeepSpeed")
    return BackendChoice("torch", "plain data parallelism needs no more")

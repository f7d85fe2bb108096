"""Which backend runs a config, and why: chosen by rule, said once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.config.schema import Member

__all__ = ["Choice", "choose", "of_deepspeed_alone"]


class Choice(NamedTuple):
    """The backend, "torch" or "deepspeed", and the reason in words."""

    name: str
    reason: str


def of_deepspeed_alone(members: Sequence[Member]) -> list[Member]:
    """Return the keys that only DeepSpeed honours, outermost first."""
    found: list[Member] = []
    for member in members:
        inside = found and member.pointer.startswith(f"{found[-1].pointer}/")
        if member.schema.get("x-backend") == "deepspeed" and not inside:
            found.append(member)
    return found


def _divides(members: Sequence[Member]) -> list[Member]:
    """Return the ZeRO stage if it is one: PyTorch has it too, but is to be asked for it."""
    return [
        member
        for member in members
        if (member.pointer == "/zero_optimization/stage" and member.value not in (0, "auto"))
        or (member.pointer == "/zero_optimization" and member.value is True)
    ]


def choose(config: Mapping[str, Any], members: Sequence[Member]) -> Choice:
    """Return the backend of a config: the one that it names, or the one that honours its keys.

    >>> choose({"train_batch_size": 8}, []).name
    'torch'
    """
    named = config.get("engine", {}).get("backend", "auto")
    if named != "auto":
        return Choice(named, "`engine.backend` says so")
    needed = [*_divides(members), *of_deepspeed_alone(members)]
    if needed:
        keys = ", ".join(member.pointer[1:].replace("/", ".") for member in needed[:3])
        return Choice("deepspeed", f"{keys} mean{'s' * (len(needed) == 1)} DeepSpeed")
    return Choice("torch", "plain data parallelism needs no more")

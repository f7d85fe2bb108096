"""Choose the torch or the DeepSpeed backend for a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.config.batch_sizes import PIPELINE_STAGES, count_ranks_per_model
from engine.config.no_effect import find_reason_for_no_effect
from engine.config.pointers import dotted_name, is_within
from engine.config.schema import Member

__all__ = [
    "BackendChoice",
    "choose_backend",
    "find_deepspeed_only_keys",
    "find_offload_device",
    "zero_stage",
]

_OLD_OFFLOAD_KEYS = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}


class BackendChoice(NamedTuple):
    """The chosen backend ("torch" or "deepspeed") and the reason for the choice."""

    name: str
    reason: str


def zero_stage(config: Mapping[str, Any]) -> int | str:
    """Return the ZeRO stage of a config: 0 to 3, or "auto". The default is 0.

    >>> zero_stage({"zero_optimization": True}), zero_stage({"zero_optimization": {"stage": 2}})
    (1, 2)
    """
    section = config.get("zero_optimization", {})
    stage: int | str = int(section) if isinstance(section, bool) else section.get("stage", 0)
    return stage


def find_offload_device(config: Mapping[str, Any], name: str) -> str:
    """Return the device to which a config offloads the optimizer or the parameters.

    The device is "none", "cpu", "nvme" or "auto".

    Args:
        config: config with a ``zero_optimization`` section.
        name: key of the offloading section: "offload_optimizer" or "offload_param".

    >>> find_offload_device({"zero_optimization": {"cpu_offload": True}}, "offload_optimizer")
    'cpu'
    """
    section = config.get("zero_optimization", {})
    if not isinstance(section, Mapping):
        return "none"
    default = "cpu" if section.get(_OLD_OFFLOAD_KEYS[name]) is True else "none"
    device: str = (section.get(name) or {}).get("device", default)
    return device


def find_deepspeed_only_keys(members: Sequence[Member]) -> list[Member]:
    """Return the config's keys and sections that only DeepSpeed supports.

    If a section is supported only by DeepSpeed, its keys are not listed separately. Keys and
    sections that do not affect the training results are omitted, because the PyTorch backend can
    ignore them.

    Args:
        members: all keys of the config; each section precedes its keys.
    """
    found: list[Member] = []
    last = None
    for member in members:
        inside = last is not None and is_within(member.pointer, [last])
        if member.schema.get("x-backend") == "deepspeed" and not inside:
            last = member.pointer
            if find_reason_for_no_effect(member, "torch") is None:
                found.append(member)
    return found


def choose_backend(
    config: Mapping[str, Any], members: Sequence[Member], needs_deepspeed: str | None = None
) -> BackendChoice:
    """Choose the backend for a config.

    If ``engine.backend`` is "torch" or "deepspeed", that backend is chosen. Otherwise, DeepSpeed is
    chosen if

    - the config enables ZeRO, has pipeline stages, or contains a key that affects the results and
      that only DeepSpeed supports,
    - the model or a keyword argument requires DeepSpeed (``needs_deepspeed``), or
    - the optimizer is Muon, for which DeepSpeed's implementation is the default.

    In all other cases, torch is chosen.

    Args:
        config: config to choose the backend for.
        members: all keys of the config; each section precedes its keys.
        needs_deepspeed: keyword argument or model feature that only DeepSpeed supports, such as an
            MoE layer; None if there is none.

    >>> choose_backend({"train_batch_size": 8}, []).name
    'torch'
    """
    named = config.get("engine", {}).get("backend", "auto")
    if named != "auto":
        return BackendChoice(named, "set by `engine.backend`")
    found = find_deepspeed_only_keys(members)
    found += [member for member in members if member.schema.get("x-selects") == "deepspeed"]
    keys = [dotted_name(member.pointer) for member in found]
    if PIPELINE_STAGES in count_ranks_per_model(config):
        keys.insert(0, PIPELINE_STAGES)
    if zero_stage(config) not in {0, "auto"}:
        is_old = isinstance(config["zero_optimization"], bool)
        keys.insert(0, "zero_optimization" if is_old else "zero_optimization.stage")
    if needs_deepspeed:
        keys.insert(0, needs_deepspeed)
    if keys:
        return BackendChoice("deepspeed", f"selected by {', '.join(keys[:3])}")
    return BackendChoice("torch", "no key selects DeepSpeed")

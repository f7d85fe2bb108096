"""Find the config key, if any, that requires DeepSpeed's CPU Adam optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.backend_choice import find_offload_device

__all__ = ["find_cpu_adam_key"]


def find_cpu_adam_key(config: Mapping[str, Any]) -> str | None:
    """Return the config key that requires DeepSpeed's CPU Adam, or None if no key requires it.

    CPU Adam is DeepSpeed's implementation of Adam for optimizer states in CPU memory.

    >>> find_cpu_adam_key({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}})
    'bf16.bf16_master_weights_and_grads'
    """
    fp16, bf16 = _get(config, "fp16"), _get(config, "bf16") or _get(config, "bfloat16")
    if fp16.get("fp16_master_weights_and_grads") is True:
        return "fp16.fp16_master_weights_and_grads"
    # With 16-bit states and no offloading, the whole optimizer is on the GPU.
    is_offloaded = find_offload_device(config, "offload_optimizer") != "none"
    has_states = bf16.get("bf16_optimizer_states") is True and not is_offloaded
    if bf16.get("bf16_master_weights_and_grads") is True and not has_states:
        return "bf16.bf16_master_weights_and_grads"
    return None


def _get(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}

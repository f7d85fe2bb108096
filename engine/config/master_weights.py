"""Find the config key, if any, that requires DeepSpeed's CPU Adam optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.backend_choice import find_offload_device

__all__ = ["find_bf16_name", "find_cpu_adam_key"]


def find_bf16_name(config: Mapping[str, Any]) -> str:
    """Return the name of the config's bf16 section: "bf16", or its deprecated name "bfloat16"."""
    return "bfloat16" if "bfloat16" in config and "bf16" not in config else "bf16"


def find_cpu_adam_key(config: Mapping[str, Any]) -> str | None:
    """Return the config key that requires DeepSpeed's CPU Adam, or None if no key requires it.

    CPU Adam is DeepSpeed's implementation of Adam for optimizer states in CPU memory. ZenFlow has
    a variant of it, and reads the optimizer's parameters from the config.

    >>> find_cpu_adam_key({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}})
    'bf16.bf16_master_weights_and_grads'
    """
    bf16_name = find_bf16_name(config)
    fp16, bf16 = _get(config, "fp16"), _get(config, bf16_name)
    if fp16.get("fp16_master_weights_and_grads") is True:
        return "fp16.fp16_master_weights_and_grads"
    # With 16-bit states and no offloading, the whole optimizer is on the GPU.
    is_offloaded = find_offload_device(config, "offload_optimizer") != "none"
    has_states = bf16.get("bf16_optimizer_states") is True and not is_offloaded
    if bf16.get("bf16_master_weights_and_grads") is True and not has_states:
        return f"{bf16_name}.bf16_master_weights_and_grads"
    if _get(config, "zero_optimization").get("zenflow") is not None:
        return "zero_optimization.zenflow"
    return None


def _get(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}

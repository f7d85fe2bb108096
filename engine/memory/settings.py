"""Read the config settings that determine how much memory the model states need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import schemas
from engine.config.backend_choice import find_offload_device, zero_stage
from engine.config.batch_sizes import (
    BATCH_KEYS,
    PIPELINE_STAGES,
    BatchError,
    count_ranks_per_model,
    derive_batch_sizes,
)
from engine.config.optimizer_block import OptimizerBlock, build_optimizer_block
from engine.config.pointers import get_last_key
from engine.config.rules import RuleContext
from engine.config.schema import SCHEMA, add_defaults

__all__ = ["DeepSpeedSettings", "MemorySettings", "read_settings"]

Precision = Literal["fp32", "bf16", "fp16"]

_FLOAT32 = {"fp32", "float32", "float", "torch.float32"}
_TENSOR_PARALLELISM = "tensor_parallel.autotp_size"
_DEFAULT_OPTIMIZER = OptimizerBlock("AdamW", {})


@dataclass(frozen=True)
class DeepSpeedSettings:
    """DeepSpeed settings that affect the memory of the model states."""

    accumulates_in_float32: bool = False
    """Whether 16-bit gradients are accumulated in float32 (``data_types.grad_accum_dtype``)."""
    has_16_bit_masters: bool = False
    """Whether the master copies of the parameters and gradients are 16-bit."""
    has_16_bit_states: bool = False
    max_live_parameters: int = 10**9
    """Maximum number of parameter elements that ZeRO stage 3 keeps gathered."""
    persistence_threshold: int = 10**5
    """Maximum size, in elements, of a parameter that ZeRO stage 3 leaves unsharded."""
    sub_group_size: int = 10**9
    """Maximum number of parameter elements that the optimizer updates at once in ZeRO stage 3."""


@dataclass(frozen=True)
class MemorySettings:
    """The settings that determine how much memory the model states need on each rank."""

    backend: Literal["torch", "deepspeed"]
    world_size: int
    """Number of ranks."""
    zero_stage: int
    precision: Precision = "fp32"
    optimizer: OptimizerBlock = _DEFAULT_OPTIMIZER
    has_optimizer: bool = True
    """Whether the config has an optimizer; if not, AdamW is assumed."""
    accumulates: bool = False
    """Whether each optimizer step has more than one micro-batch."""
    offload_optimizer: str = "none"
    """Device to which the optimizer states are offloaded: none, cpu or nvme."""
    offload_param: str = "none"
    """Device to which the parameters are offloaded: none, cpu or nvme."""
    master_weights: bool = True
    """Whether the PyTorch backend converts trainable 16-bit parameters to float32."""
    on_cpu: bool = False
    """Whether the run trains on the CPU."""
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 shards the model."""
        return self.backend == "torch" and self.zero_stage > 0 and self.world_size > 1


def read_settings(context: RuleContext, world_size: int) -> MemorySettings:
    """Return the config settings that determine how much memory the model states need.

    Args:
        context: validated config values, and values derived from them.
        world_size: number of ranks.

    Raises:
        ValueError: if the config splits the model's layers across ranks.
    """
    config = context.config
    for key in count_ranks_per_model(config).keys() & {PIPELINE_STAGES, _TENSOR_PARALLELISM}:
        raise ValueError(
            "The memory estimate does not cover models whose layers are split across ranks "
            f"(`{key}`). Remove the key, and specify the number of parameters per rank instead of "
            "the total."
        )
    value = add_defaults(config, schemas.read(SCHEMA))
    engine = value["engine"]
    block = build_optimizer_block(config.get("optimizer"), context.backend.name)
    backend: Literal["torch", "deepspeed"] = (
        "deepspeed" if context.backend.name == "deepspeed" else "torch"
    )
    return MemorySettings(
        backend=backend,
        world_size=world_size,
        zero_stage=int(zero_stage(config)),
        precision=_find_precision(value),
        optimizer=block or _DEFAULT_OPTIMIZER,
        has_optimizer=block is not None,
        accumulates=_has_accumulation(context, world_size),
        offload_optimizer=find_offload_device(config, "offload_optimizer"),
        offload_param=find_offload_device(config, "offload_param"),
        master_weights=engine["master_weights"],
        on_cpu=engine["device"] == "cpu",
        deepspeed=_read_deepspeed(context),
    )


def _find_precision(value: Mapping[str, Any]) -> Precision:
    if value["fp16"]["enabled"]:
        return "fp16"
    return "bf16" if value["bfloat16" if "bfloat16" in value else "bf16"]["enabled"] else "fp32"


def _has_accumulation(context: RuleContext, world_size: int) -> bool:
    sizes = {key: context.config[key] for key in BATCH_KEYS if key in context.config}
    try:
        return derive_batch_sizes(sizes, context.data_ranks or world_size).accumulation > 1
    except BatchError:  # such as "auto" in the config
        return False


def _read_deepspeed(context: RuleContext) -> DeepSpeedSettings:
    given = {get_last_key(member.pointer): member.value for member in context.members}

    def get(names: tuple[str, ...], default: int) -> int:
        found = next((given[name] for name in names if isinstance(given.get(name), int)), default)
        return int(found)

    none = DeepSpeedSettings()
    return DeepSpeedSettings(
        accumulates_in_float32=given.get("grad_accum_dtype") in _FLOAT32,
        has_16_bit_masters=any(
            given.get(name) is True
            for name in ("fp16_master_weights_and_grads", "bf16_master_weights_and_grads")
        ),
        has_16_bit_states=given.get("bf16_optimizer_states") is True,
        max_live_parameters=get(
            ("stage3_max_live_parameters", "max_live_parameters"), none.max_live_parameters
        ),
        persistence_threshold=get(
            ("stage3_param_persistence_threshold", "param_persistence_threshold"),
            none.persistence_threshold,
        ),
        sub_group_size=get(("sub_group_size",), none.sub_group_size),
    )

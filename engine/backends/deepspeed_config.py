"""Build the config that is passed to DeepSpeed.

The result is the user's config without the keys that onecycle handles itself. If the config
contains a section, most of the section's missing keys are set to the defaults in onecycle's
schemas, because DeepSpeed's own defaults change between versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import schemas
from engine.config import Config
from engine.config.batch_sizes import BATCH_KEYS
from engine.config.optimizer_types import TORCH_ARGUMENTS
from engine.config.pointers import get_parent
from engine.config.schema import (
    ABSENT,
    SCHEMA,
    SECTION,
    get_default,
    is_ignored,
    to_nested_dict,
    walk,
)

__all__ = ["build_deepspeed_config"]

# Keys that DeepSpeed does not support, or that onecycle handles instead of DeepSpeed.
_ENGINE_KEYS = (
    "$schema",
    "csv_monitor",
    "engine",
    "optimizer",
    "scheduler",
    "steps_per_print",
    "tensorboard",
    "wandb",
)

# The param groups are built before DeepSpeed's engine, and passed to it as `model_parameters`.
_GROUP_KEYS = {"layer_decay", "no_decay", "param_groups"}


def build_deepspeed_config(config: Config, *, builds_optimizer: bool) -> dict[str, Any]:
    """Build the config dict for ``deepspeed.initialize``.

    Args:
        config: a validated config.
        builds_optimizer: whether DeepSpeed builds the config's optimizer itself.
    """
    own = {
        key: value
        for key, value in _drop_parked_keys(config.raw).items()
        if key not in _ENGINE_KEYS
    }
    if "bfloat16" in own:
        own["bf16"] = own.pop("bfloat16")
    zero = own.get("zero_optimization")
    if isinstance(zero, bool):
        own["zero_optimization"] = {"stage": config.zero_stage}
    elif zero is not None:
        own["zero_optimization"] = {key: each for key, each in zero.items() if each != "auto"}
    # Do not add missing sections, because the presence of some sections has an effect.
    settings = to_nested_dict(
        member
        for member in walk(own, schemas.read(SCHEMA), fill=_fill)
        if member.is_given or get_parent(member.pointer)
    )
    if settings.get("fp16", {}).get("min_loss_scale") == 0:
        settings["fp16"]["min_loss_scale"] = 1  # DeepSpeed 0.19 rejects 0
    sizes = (config.batch.train, config.batch.micro, config.batch.accumulation)
    settings |= dict(zip(BATCH_KEYS, sizes, strict=True))
    if "tensor_parallel" in settings:
        del settings["train_batch_size"]  # DeepSpeed may count the ranks of AutoTP in it
    settings["gradient_clipping"] = config.gradient_clipping
    if builds_optimizer and "optimizer" in config.raw:
        block = _drop_parked_keys(config.raw["optimizer"])
        settings["optimizer"] = {
            key: value for key, value in block.items() if key not in _GROUP_KEYS
        }
        params = settings["optimizer"].get("params", {})
        settings["optimizer"]["params"] = {
            key: value for key, value in params.items() if value or key not in TORCH_ARGUMENTS
        }
    else:
        # By default, DeepSpeed rejects offloading with an optimizer that it did not build.
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
    return settings


def _drop_parked_keys(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _drop_parked_keys(below) for key, below in value.items() if not is_ignored(key)}


def _fill(schema: Mapping[str, Any]) -> Any:
    """Return the default to pass to DeepSpeed for a missing key, or ABSENT to omit the key."""
    default = get_default(schema, "deepspeed")
    is_newer = "x-since" in schema  # the installed DeepSpeed may be older than the key
    return ABSENT if default is None or default is SECTION or is_newer else default

"""The config that DeepSpeed is given: the user's own, less what is ours, every default spelled out.

DeepSpeed's defaults drift from version to version; what was proved is what is to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import schemas
from engine.config import Config
from engine.config.batch_sizes import BATCH_KEYS
from engine.config.pointers import parent_of
from engine.config.schema import ABSENT, SCHEMA, SECTION, default_of, is_parked, nest, walk

__all__ = ["deepspeed_config"]

# What is ours, or what we do in its place.
_OURS = (
    "$schema",
    "csv_monitor",
    "engine",
    "optimizer",
    "scheduler",
    "steps_per_print",
    "tensorboard",
    "wandb",
)


def deepspeed_config(config: Config, *, builds_optimizer: bool) -> dict[str, Any]:
    """Return the dict for ``deepspeed.initialize``.

    Args:
        config: proved right.
        builds_optimizer: whether DeepSpeed is to build the config's optimizer itself.
    """
    own = {key: value for key, value in _without_parked(config.own).items() if key not in _OURS}
    if "bfloat16" in own:
        own["bf16"] = own.pop("bfloat16")
    if isinstance(own.get("zero_optimization"), bool):
        own["zero_optimization"] = {"stage": config.zero_stage}
    # Absent sections stay absent: the presence of some has an effect.
    settings = nest(
        member
        for member in walk(own, schemas.read(SCHEMA), fill=_fill)
        if member.is_given or parent_of(member.pointer)
    )
    sizes = (config.batch.train, config.batch.micro, config.batch.accumulation)
    settings |= dict(zip(BATCH_KEYS, sizes, strict=True))
    settings["gradient_clipping"] = config.gradient_clipping
    if builds_optimizer and "optimizer" in config.own:
        settings["optimizer"] = _without_parked(config.own["optimizer"])
    else:
        # An optimizer that DeepSpeed did not build would be refused where states are offloaded.
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
    return settings


def _without_parked(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without_parked(below) for key, below in value.items() if not is_parked(key)}


def _fill(schema: Mapping[str, Any]) -> Any:
    """Return the default that DeepSpeed is given for a key that a section lacks."""
    default = default_of(schema, "deepspeed")
    is_newer = "x-since" in schema  # the installed DeepSpeed may be older than the key
    return ABSENT if default is None or default is SECTION or is_newer else default

"""The config that DeepSpeed is given: the user's own, less what is ours, every default spelled out.

DeepSpeed's defaults drift from version to version; what was proved is what is to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import schemas
from engine.config import Config
from engine.config.batch_sizes import BATCH_KEYS
from engine.config.schema import SCHEMA, is_parked, resolve_reference

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
    own = {key: value for key, value in config.own.items() if key not in _OURS}
    if "bfloat16" in own:
        own["bf16"] = own.pop("bfloat16")
    if isinstance(own.get("zero_optimization"), bool):
        own["zero_optimization"] = {"stage": int(own["zero_optimization"])}
    properties = schemas.read(SCHEMA)["properties"]
    settings = {
        key: _spelled_out(value, resolve_reference(properties.get(key, {})))
        for key, value in own.items()
        if not is_parked(key)
    }
    sizes = (config.batch.train, config.batch.micro, config.batch.accumulation)
    settings |= dict(zip(BATCH_KEYS, sizes, strict=True))
    settings["gradient_clipping"] = config.gradient_clipping
    if builds_optimizer and "optimizer" in config.own:
        block = config.own["optimizer"]
        settings["optimizer"] = {key: block[key] for key in block if not is_parked(key)}
    else:
        # An optimizer that DeepSpeed did not build would be refused where states are offloaded.
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
    return settings


def _spelled_out(value: Any, schema: Mapping[str, Any]) -> Any:
    if not isinstance(value, Mapping):
        return value
    properties = schema.get("properties", {})
    filled = {
        key: _spelled_out(below, properties.get(key, {}))
        for key, below in value.items()
        if not is_parked(key)
    }
    given = [properties.get(key, {}) for key in filled]
    aliased = {of_key.get(name) for of_key in given for name in ("x-alias-of", "x-instead")}
    for key, of_key in properties.items():
        old = of_key.get("deprecated") or "x-alias-of" in of_key or "x-removed" in of_key
        newer = "x-since" in of_key  # an installed DeepSpeed may be older than the key
        if key in filled or key in aliased or old or newer:
            continue
        if of_key.get("default") is not None:
            filled[key] = of_key["default"]
    return filled

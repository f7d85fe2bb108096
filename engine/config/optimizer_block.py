"""Read the ``optimizer`` section of a config, and fill in its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.config.param_groups import GroupSettings
from engine.config.schema import add_optimizer_defaults, optimizer_name, optimizer_schema
from schedules import Schedule

__all__ = ["OptimizerBlock", "build_optimizer_block"]


@dataclass(frozen=True)
class OptimizerBlock:
    """The config's ``optimizer`` section with defaults filled in and a canonical ``type``."""

    type: str
    params: Mapping[str, Any]
    param_groups: tuple[GroupSettings, ...] = ()
    no_decay: bool = False
    """Whether to exclude biases and normalization weights from weight decay. The setting
    applies to parameters that no entry of ``param_groups`` selects."""
    layer_decay: float = 1.0
    group_schedules: Mapping[int, Schedule[Any]] = field(default_factory=dict)
    """Schedules of individual param groups, by index in ``param_groups``."""

    @property
    def group_keys(self) -> tuple[str, ...]:
        """Dotted names of the keys that this config uses to divide parameters into param groups."""
        keys = {
            "param_groups": bool(self.param_groups),
            "no_decay": self.no_decay,
            "layer_decay": self.layer_decay != 1,
        }
        return tuple(f"optimizer.{key}" for key, is_used in keys.items() if is_used)


def build_optimizer_block(
    block: Mapping[str, Any] | None,
    backend: str,
    group_schedules: Mapping[int, Schedule[Any]] | None = None,
) -> OptimizerBlock | None:
    """Return the ``optimizer`` section with defaults filled in, or None if it is absent.

    Args:
        block: a valid ``optimizer`` section; None if the section is absent.
        backend: "torch" or "deepspeed"; some defaults depend on it.
        group_schedules: schedules of individual param groups, by index in ``param_groups``.
    """
    if block is None:
        return None
    name = optimizer_name(block["type"])
    assert name is not None
    schemas_of_params = optimizer_schema(name)["properties"]

    def convert(params: Mapping[str, Any]) -> dict[str, Any]:
        return {k: _as_floats(each, schemas_of_params.get(k, {})) for k, each in params.items()}

    no_decay = block.get("no_decay", False)
    groups = [
        GroupSettings.from_config(entry, no_decay=no_decay)
        for entry in block.get("param_groups", ())
    ]
    return OptimizerBlock(
        name,
        convert(add_optimizer_defaults(name, block.get("params", {}), backend)),
        tuple(replace(each, hyperparameters=convert(each.hyperparameters)) for each in groups),
        no_decay,
        float(block.get("layer_decay", 1.0)),
        dict(group_schedules or {}),
    )


def _as_floats(value: Any, schema: Mapping[str, Any]) -> Any:
    """Convert an integer, or each integer in a list, to a float if the schema allows floats.

    PyTorch rejects betas that mix an integer and a float, such as ``(0, 0.999)``.
    """
    if isinstance(value, list):
        return [_as_floats(each, schema.get("items", {})) for each in value]
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and "number" in schema.get("type", ()) else value

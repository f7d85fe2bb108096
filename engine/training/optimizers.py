"""Optimizers by the names that configs call them, each with PyTorch's fastest implementation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from engine.config.resolve import OptimizerBlock
from engine.config.schema import optimizer_name, optimizer_schema

__all__ = ["build_optimizer", "is_buildable"]

_WITH_FUSED_KERNEL = {"Adam", "AdamW", "SGD"}


def build_optimizer(block: OptimizerBlock, parameters: Iterable[Any]) -> Optimizer:
    """Return the optimizer of a config's block.

    Args:
        block: its name and all of its parameters.
        parameters: tensors, or param groups, which may have values of their own.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> params = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "dampening": 0.0}
    >>> build_optimizer(OptimizerBlock("SGD", params), [weight]).defaults["momentum"]
    0.9
    """
    params = dict(block.params)
    name = block.type
    if params.pop("adam_w_mode", False) and name == "Adam":
        name = "AdamW"
    plain = params.pop("torch_adam", False)
    groups = list(parameters)
    if name in _WITH_FUSED_KERNEL and not plain and _fusable(groups):
        params["fused"] = True
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    optimizer: Optimizer = getattr(torch.optim, name)(groups, **params)
    return optimizer


def is_buildable(block: Mapping[str, Any]) -> bool:
    """Return whether PyTorch has a config's optimizer, with all of the parameters that it gives.

    >>> is_buildable({"type": "AdamW"}), is_buildable({"type": "Lamb"})
    (True, False)
    """
    schema = optimizer_schema(optimizer_name(block["type"]) or "")
    properties = schema["properties"]
    of_deepspeed = [
        key for key in block.get("params", {}) if "x-backend" in properties.get(key, {})
    ]
    asks = block.get("params", {}).get("torch_adam") is False
    return "x-backend" not in schema and not of_deepspeed and not asks


def _fusable(groups: list[Any]) -> bool:
    tensors = [
        tensor
        for group in groups
        for tensor in (group["params"] if isinstance(group, dict) else [group])
    ]
    return all(
        tensor.is_floating_point() and tensor.device.type in {"cpu", "cuda"} for tensor in tensors
    )

"""Every optimizer that the config accepts on PyTorch, with hyperparameters for tests."""

import torch

from engine.config.schema import OPTIMIZERS

__all__ = ["HYPERPARAMETERS", "NOT_SHARDED", "VARIANTS", "build_reference"]

HYPERPARAMETERS = {
    "Adam": {"lr": 0.01, "betas": [0.8, 0.95], "amsgrad": True},
    "AdamW": {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1},
    "Adadelta": {"lr": 1.0, "rho": 0.8, "weight_decay": 0.1},
    "Adamax": {"lr": 0.01, "weight_decay": 0.1},
    "ASGD": {"lr": 0.1, "lambd": 0.1, "t0": 2.0},
    "NAdam": {"lr": 0.01, "momentum_decay": 0.1, "weight_decay": 0.1},
    "RAdam": {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "RMSprop": {"lr": 0.01, "alpha": 0.9, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 0.01, "etas": [0.4, 1.3]},
    "Adafactor": {"lr": 0.05, "beta2_decay": -0.7, "d": 1.5, "weight_decay": 0.1},
}

VARIANTS = {
    **{name: {"type": name, "params": params} for name, params in HYPERPARAMETERS.items()},
    "Adam without decoupled decay": {
        "type": "Adam",
        "params": {"lr": 0.01, "weight_decay": 0.1, "adam_w_mode": False},
    },
    "SGD with dampening": {
        "type": "SGD",
        "params": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    },
    "Adagrad from zero": {"type": "Adagrad", "params": {"lr": 0.1}},
    "AdamW of torch": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
}
"""The config's ``optimizer`` block of each variant; each type occurs at least once."""

NOT_SHARDED = {"Adafactor", "Rprop"}
"""Variants that PyTorch cannot run on sharded parameters."""

ON_TORCH = {
    name
    for name, schema in OPTIMIZERS.items()
    if schema.get("x-backend") != "deepspeed" and "x-removed" not in schema
}
ON_TORCH -= {"Muon"}  # it trains matrices only, so it has tests of its own
assert set(HYPERPARAMETERS) == ON_TORCH, set(HYPERPARAMETERS) ^ ON_TORCH


def build_reference(variant, parameters):
    """Build the optimizer of a variant directly with PyTorch, without this library."""
    block = VARIANTS[variant]
    name, params = block["type"], dict(block["params"])
    if params.pop("torch_adam", False):
        params.setdefault("weight_decay", 0.01)
    if name == "Adam" and params.pop("adam_w_mode", True):
        name, params = "AdamW", {"weight_decay": 0.0, **params}
    return getattr(torch.optim, name)(parameters, **params)

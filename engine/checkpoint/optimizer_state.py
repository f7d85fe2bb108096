"""The state of an optimizer by parameter name.

``torch.distributed.checkpoint.state_dict`` offers the same, but takes an optimizer step to create
missing states: a run that saves before its first step would continue differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from engine.checkpoint.plain_values import report_damage
from engine.checkpoint.safetensors_storage import SHARDS
from engine.checkpoint.structure import (
    HYPERPARAMETERS,
    check_param_groups,
    check_parameter_states,
)
from engine.errors import CheckpointError

__all__ = [
    "VALUES",
    "build_empty_state",
    "check_optimizer_state",
    "find_outside_parameters",
    "get_optimizer_state",
    "load_optimizer_state",
    "reshard",
]

VALUES = "values.pt"
"""File for values that are not tensors and are equal on all ranks, e.g. param group settings."""
_STATE = "optimizer.state."
_GROUPS = "optimizer.param_groups."
_OUTSIDE = "param_groups."
_NOT_RESTORED = {"params", "fused", "foreach"}
"""Settings of a param group that depend on how this run stores its parameters."""


def get_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's ``state_dict`` with parameter names in place of indices.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> get_optimizer_state(model, optimizer)["param_groups"][0]["params"]
    ['weight']
    """
    names = _name_parameters(model, optimizer)
    return {
        "state": {
            name: dict(optimizer.state[parameter])
            for name, parameter in names
            if parameter in optimizer.state
        },
        "param_groups": _name_groups(optimizer, names),
    }


def build_empty_state(
    directory: Path, model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a state to load a checkpoint into, with uninitialized tensors.

    States of parameters that this optimizer does not have are left out.

    Args:
        directory: directory of the checkpoint, for the error message.
        model: model whose parameters are optimized.
        optimizer: optimizer that will load the state.
        saved: the checkpoint's values and its tensors' metadata, by dotted name.

    Raises:
        CheckpointError: the number of param groups differs.
        Exception: a name of a value is invalid.
    """
    names = _name_parameters(model, optimizer)
    parameters = dict(names)
    state: dict[str, dict[str, Any]] = {}
    groups = _name_groups(optimizer, names)
    settings: list[dict[str, Any]] = [{} for _ in groups]
    saved_groups = {
        key.removeprefix(_GROUPS).split(".")[0] for key in saved if key.startswith(_GROUPS)
    }
    if len(saved_groups) != len(groups):
        raise CheckpointError(
            f"{directory} does not match the optimizer: it has {len(saved_groups)} param groups in "
            f"the checkpoint, {len(groups)} now. Build the optimizer that was saved, or pass "
            "`load_optimizer_states=False`."
        )
    for key, value in saved.items():
        if key.startswith(_STATE):
            name, path = _split_name(key.removeprefix(_STATE), parameters)
            if name is not None:
                _insert(state.setdefault(name, {}), path, _allocate(parameters[name], value))
        elif key.startswith(_GROUPS):
            index, setting = key.removeprefix(_GROUPS).split(".", 1)
            if setting not in _NOT_RESTORED:
                _insert(settings[int(index)], setting.split("."), _allocate(None, value))
    for number, (group, each) in enumerate(zip(groups, settings, strict=True)):
        for key in HYPERPARAMETERS:
            if key in group and key not in each:
                raise ValueError(f"`optimizer.param_groups[{number}]` must have the key `{key}`.")
    return {
        "state": {name: _restore_lists(state[name]) for name in parameters if name in state},
        "param_groups": [
            {**group, **_restore_lists(each)} for group, each in zip(groups, settings, strict=True)
        ],
    }


def check_optimizer_state(
    directory: Path, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
) -> None:
    """Check a state that was loaded from a checkpoint, and has parameter names in place of indices.

    Raises:
        CheckpointError: the optimizer cannot continue from the state.
    """
    names = _name_parameters(model, optimizer)
    with report_damage(directory / VALUES):
        check_param_groups(state["param_groups"], _name_groups(optimizer, names))
    with report_damage(directory / SHARDS):
        check_parameter_states(state["state"], optimizer, dict(names))


def find_outside_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the optimized parameters that are not in the model, such as those of a loss function.

    Their names consist of their positions in the param groups.
    """
    named = _name_parameters(model, optimizer)
    return {name: parameter for name, parameter in named if name.startswith(_OUTSIDE)}


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state that has parameter names in place of indices.

    Raises:
        Exception: the optimizer does not accept the state. It is unchanged.
    """
    indices = {name: index for index, (name, _) in enumerate(_name_parameters(model, optimizer))}
    converted = {
        "state": {indices[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [indices[name] for name in group["params"]]}
            for group in state["param_groups"]
        ],
    }
    before = optimizer.state, optimizer.param_groups
    try:
        optimizer.load_state_dict(converted)
    except BaseException:
        optimizer.state, optimizer.param_groups = before
        raise


def reshard(model: nn.Module) -> None:
    """Shard parameters again that FSDP gathered for a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _name_parameters(model: nn.Module, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Return each optimized parameter with its name; the order is that of ``state_dict``."""
    reshard(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            found.append((names.get(id(parameter), f"{_OUTSIDE}{i}.params.{j}"), parameter))
    return found


def _name_groups(
    optimizer: Optimizer, names: list[tuple[str, nn.Parameter]]
) -> list[dict[str, Any]]:
    by_id = {id(parameter): name for name, parameter in names}
    return [
        {**group, "params": [by_id[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


def _split_name(key: str, parameters: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Split the dotted name of a state into the parameter's name and the path below it."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        if name in parameters:
            return name, parts[end:]
    return None, []


def _insert(holder: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        holder = holder.setdefault(key, {})
    holder[path[-1]] = value


def _restore_lists(value: Any) -> Any:
    """Return nested dicts with those whose keys are 0, 1, 2, … as lists."""
    if not isinstance(value, dict):
        return value
    restored = {key: _restore_lists(below) for key, below in value.items()}
    indices = [str(index) for index in range(len(restored))]
    is_list = bool(restored) and restored.keys() == set(indices)  # in any order
    return [restored[index] for index in indices] if is_list else restored


def _allocate(parameter: nn.Parameter | None, value: Any) -> Any:
    """Return a tensor to load a saved tensor into, sharded like its parameter; else the value."""
    if not isinstance(value, TensorStorageMetadata):
        return value
    dtype = value.properties.dtype
    if parameter is None or not value.size:  # step counts stay on the host
        return torch.empty(value.size, dtype=dtype)
    if isinstance(parameter, DTensor) and value.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype)
    return torch.empty(value.size, dtype=dtype, device=parameter.device)

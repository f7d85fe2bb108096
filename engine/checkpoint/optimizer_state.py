"""Get and load optimizer states that identify parameters by name.

This module does not use ``torch.distributed.checkpoint.state_dict``, because its functions take an
optimizer step to create missing states. Saving a checkpoint before the first step would then change
the results of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from engine.checkpoint.fingerprint import KERNEL_SETTINGS
from engine.checkpoint.optimizer_tensors import keep_tensors
from engine.checkpoint.plain_values import report_damage
from engine.checkpoint.safetensors_storage import SHARDS
from engine.checkpoint.structure import (
    HYPERPARAMETERS,
    check_param_groups,
    check_parameter_states,
)
from engine.errors import CheckpointError

__all__ = [
    "KEPT_SETTINGS",
    "VALUES",
    "build_empty_state",
    "check_optimizer_state",
    "find_outside_parameters",
    "get_optimizer_state",
    "list_group_names",
    "load_optimizer_state",
    "reshard",
]

VALUES = "values.pt"
"""Name of the file for values that are not tensors, such as param group settings.

These values are equal on all ranks, so only rank 0 writes the file.
"""
_STATE = "optimizer.state."
_GROUPS = "optimizer.param_groups."
_OUTSIDE = "param_groups."
_NOT_RESTORED = KERNEL_SETTINGS | {"params"}
"""Settings of a param group that keep this run's values when a checkpoint is loaded."""


KEPT_SETTINGS = frozenset(
    {"capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize"}
)
"""Settings of a param group that are not restored from a DeepSpeed checkpoint, because DeepSpeed
may have used a different implementation of the optimizer."""


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
    """Return an optimizer state with uninitialized tensors, into which a checkpoint can be loaded.

    States saved for parameters that are not in this optimizer are left out.

    Args:
        directory: directory of the checkpoint, for the error message.
        model: model that contains the optimized parameters.
        optimizer: optimizer that will load the state.
        saved: values and tensor metadata in the checkpoint, by dotted name.

    Raises:
        CheckpointError: if the checkpoint has a different number of param groups.
        Exception: if the checkpoint is damaged. For example, a value has an invalid name, or a
            param group lacks a hyperparameter of the optimizer, such as the learning rate.
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
            f"{directory} does not match the optimizer: the number of param groups is "
            f"{len(saved_groups)} in the checkpoint and {len(groups)} in this run. Build the "
            "optimizer with the same param groups, or pass `load_optimizer_states=False`."
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
                raise ValueError(
                    f"`optimizer.param_groups[{number}]` in the checkpoint must have the key "
                    f"`{key}`."
                )
    return {
        "state": {name: _restore_lists(state[name]) for name in parameters if name in state},
        "param_groups": [
            {**group, **_restore_lists(each)} for group, each in zip(groups, settings, strict=True)
        ],
    }


def check_optimizer_state(
    directory: Path, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
) -> None:
    """Check that an optimizer can continue from a loaded state that identifies parameters by name.

    Raises:
        CheckpointError: if the optimizer cannot continue from the state.
    """
    names = _name_parameters(model, optimizer)
    with report_damage(directory / VALUES):
        check_param_groups(state["param_groups"], _name_groups(optimizer, names))
    with report_damage(directory / SHARDS):
        check_parameter_states(state["state"], state["param_groups"], optimizer, dict(names))


def find_outside_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the optimized parameters that are not in the model, such as those of a loss function.

    Their names are derived from their positions in the param groups.
    """
    named = _name_parameters(model, optimizer)
    return {name: parameter for name, parameter in named if name.startswith(_OUTSIDE)}


def list_group_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of the parameters in each param group."""
    groups = _name_groups(optimizer, _name_parameters(model, optimizer))
    return [group["params"] for group in groups]


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state returned by `get_optimizer_state` into an optimizer.

    Raises:
        Exception: if the optimizer rejects the state. In this case, the optimizer is unchanged.
    """
    indices = {name: index for index, (name, _) in enumerate(_name_parameters(model, optimizer))}
    groups = []
    by_kernel: dict[tuple[bool, ...], set[int]] = {}
    for group in state["param_groups"]:
        kernel = tuple(bool(group.get(key)) for key in ("fused", "capturable"))
        own = [indices[name] for name in group["params"]]
        known = by_kernel.setdefault(kernel, set())
        known.update(own)
        groups.append({**group, "params": _Indices(own, known)})
    before = optimizer.state, optimizer.param_groups
    try:
        with keep_tensors(optimizer):
            optimizer.load_state_dict(
                {
                    "state": {indices[name]: values for name, values in state["state"].items()},
                    "param_groups": groups,
                }
            )
    except BaseException:
        optimizer.state, optimizer.param_groups = before
        raise


class _Indices(list[int]):
    """Parameter indices of a param group, with an ``in`` operator that speeds up loading.

    For each state tensor, `Optimizer.load_state_dict` searches the groups one by one for the
    tensor's parameter, to read the settings ``fused`` and ``capturable`` of its group. With 10,000
    groups, this takes minutes. To end the search earlier, ``in`` also returns True for the
    parameters of all other groups with the same values of ``fused`` and ``capturable``.
    """

    def __init__(self, own: Iterable[int] = (), known: Collection[int] = ()) -> None:
        super().__init__(own)
        self._known = known

    def __contains__(self, index: object) -> bool:
        return index in self._known


def reshard(model: nn.Module) -> None:
    """Reshard the parameters that FSDP left gathered after a forward pass.

    FSDP keeps some parameters gathered for the backward pass. Without a backward pass, for example
    during evaluation, these parameters stay gathered.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _name_parameters(model: nn.Module, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Return each optimized parameter with its name, in the order of ``optimizer.state_dict``."""
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
    """Split the dotted name of a saved value into a parameter name and the keys that follow it.

    Return ``(None, [])`` if ``key`` does not start with the name of a parameter.
    """
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
    """Convert each nested dict with the keys "0", "1", "2", … to a list."""
    if not isinstance(value, dict):
        return value
    restored = {key: _restore_lists(below) for key, below in value.items()}
    indices = [str(index) for index in range(len(restored))]
    is_list = bool(restored) and restored.keys() == set(indices)  # in any order
    return [restored[index] for index in indices] if is_list else restored


def _allocate(parameter: nn.Parameter | None, value: Any) -> Any:
    """Return an uninitialized tensor, sharded like the parameter, to load a saved tensor into.

    If ``value`` does not describe a tensor, it is returned unchanged.
    """
    if not isinstance(value, TensorStorageMetadata):
        return value
    dtype = value.properties.dtype
    if parameter is None or not value.size:  # step counts stay on the host
        return torch.empty(value.size, dtype=dtype)
    if isinstance(parameter, DTensor) and value.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype)
    return torch.empty(value.size, dtype=dtype, device=parameter.device)

"""Collect, save and load unsharded weights of a model that may be sharded across ranks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.backends.base import DTYPES, Backend
from engine.checkpoint.collectives import raise_on_all_ranks, wait_for_ranks
from engine.checkpoint.optimizer_state import reshard

__all__ = ["accept_whole_weights", "collect_weights", "convert_parameters", "save_weights"]


def accept_whole_weights(model: nn.Module) -> None:
    """Let ``load_state_dict`` of a sharded model and its submodules accept unsharded tensors."""
    for module in model.modules():
        module.register_load_state_dict_pre_hook(_shard_tensors)  # type: ignore[no-untyped-call]  # untyped in torch


def _shard_tensors(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_unused: object
) -> None:
    reshard(module)
    for name, parameter in module.named_parameters(recurse=False):
        whole = state_dict.get(prefix + name)
        if not isinstance(whole, Tensor) or isinstance(whole, DTensor):
            continue
        if isinstance(parameter, DTensor) and whole.shape == parameter.shape:
            # Each rank shards its local tensor, so no rank waits for another rank.
            state_dict[prefix + name] = distribute_tensor(
                whole.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None
            )


def collect_weights(
    backend: Backend,
    *,
    destination: dict[str, Any] | None = None,
    prefix: str = "",
    keep_vars: bool = False,
    exclude_frozen: bool = False,
    is_on_rank_0_only: bool = False,
) -> dict[str, Any]:
    """Return the ``state_dict`` of the model with unsharded tensors.

    If the weights are sharded, every rank must call this function. Tensors gathered from several
    ranks are stored in host memory.

    Args:
        backend: backend that trains the model with PyTorch.
        destination: see ``nn.Module.state_dict``.
        prefix: see ``nn.Module.state_dict``.
        keep_vars: see ``nn.Module.state_dict``; gathered tensors are always detached.
        exclude_frozen: whether to leave out parameters that do not require gradients.
        is_on_rank_0_only: whether only rank 0 returns the tensors. If true, all other ranks return
            an empty dict.
    """
    model = backend.model
    weights: Any = model.state_dict(destination=destination, prefix=prefix, keep_vars=True)  # type: ignore[type-var]  # None is the default
    if exclude_frozen:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                weights.pop(prefix + name, None)
    if any(isinstance(value, DTensor) for value in weights.values()):
        wait_for_ranks(backend.ranks, "A method that gathers the weights")
    gathered: dict[int, Tensor] = {}  # tied parameters are gathered once
    for name, value in list(weights.items()):
        if isinstance(value, DTensor):
            if id(value) not in gathered:
                whole = _gather(value)
                is_kept = not is_on_rank_0_only or backend.ranks.rank == 0
                gathered[id(value)] = whole.cpu() if is_kept else whole.new_empty(0)
            weights[name] = gathered[id(value)]
        elif isinstance(value, Tensor) and not keep_vars:
            weights[name] = value.detach()
    is_left_out = is_on_rank_0_only and backend.ranks.rank != 0
    return {} if is_left_out else weights


def _gather(sharded: DTensor) -> Tensor:
    device = sharded.device_mesh.device_type
    whole: Tensor = sharded.detach().to(device).full_tensor()  # type: ignore[attr-defined]  # detach() returns a DTensor
    return whole


def save_weights(
    backend: Backend, path: Path, precision: str, *, exclude_frozen: bool = False
) -> None:
    """Save the model's unsharded weights to one file with ``torch.save``.

    If the weights are sharded, every rank must call this function.

    Args:
        backend: backend that trains the model with PyTorch.
        path: file to write; its directory is created if missing.
        precision: "bf16" or "fp16" to convert float32 parameters to that dtype; "fp32" to save them
            unchanged.
        exclude_frozen: whether to leave out parameters that do not require gradients.

    Raises:
        OSError: the disk is full or the file is not writable.
    """
    weights = collect_weights(backend, exclude_frozen=exclude_frozen, is_on_rank_0_only=True)
    is_sharded = any(isinstance(each, DTensor) for each in backend.model.parameters())
    with raise_on_all_ranks(backend.ranks) if is_sharded else contextlib.nullcontext():
        if backend.ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            convert_parameters(backend, weights, precision)
            torch.save(weights, partial)
            partial.replace(path)


def convert_parameters(backend: Backend, weights: dict[str, Any], precision: str) -> None:
    """Convert the float32 parameters in ``weights`` to bf16 or fp16, as ``precision`` specifies.

    With any other precision, the parameters stay in float32. The model itself does not change.
    """
    dtype = DTYPES.get(precision, torch.float32)
    converted: dict[Any, Tensor] = {}  # keeps tied parameters tied
    for name, _ in backend.model.named_parameters(remove_duplicate=False):
        value = weights.get(name)
        if value is not None and value.dtype == torch.float32:
            key = value.data_ptr(), value.shape
            if key not in converted:
                converted[key] = value.to(dtype)
            weights[name] = converted[key]

"""Model and optimizer as sharded files, which any number of ranks can read again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from engine.checkpoint.plain_values import read_values, write_values
from engine.checkpoint.safetensors_storage import ShardReader, ShardWriter, write_tensors
from engine.errors import CheckpointError

__all__ = ["export", "read", "read_weights", "write", "write_behind"]

VALUES = "values.pt"
"""What is no tensor, as the hyperparameters of param groups: the same on all ranks."""
_MODEL = "model."


def write(folder: Path, model: nn.Module, optimizer: Optimizer, *, frozen: bool = True) -> None:
    """Write this rank's share of model and optimizer; every rank calls it.

    Args:
        folder: where to write.
        model: the module.
        optimizer: the one that trains it.
        frozen: whether parameters that need no gradients are written as well.
    """
    _write(folder, _state_of(model, optimizer, frozen=frozen))


def write_behind(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    group: dist.ProcessGroup | None,
    arena: dict[str, Any],
    *,
    frozen: bool = True,
) -> Future[None]:
    """Copy this rank's share, and write the copy while training goes on; every rank calls it.

    Args:
        folder: where to write.
        model: copied as it is now.
        optimizer: copied as it is now.
        group: a process group that nothing else uses; None in one process.
        arena: the copies of the last time, whose memory is used again.
        frozen: whether parameters that need no gradients are written as well.

    Returns:
        What is done when this rank, and on rank 0 every rank, has written.
    """
    copies = _copied(_state_of(model, optimizer, frozen=frozen), arena)
    arena.update(copies)
    writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    started = writer.submit(_write, folder, copies, group)
    writer.shutdown(wait=False)
    return started


def _copied(value: Any, old: Any) -> Any:
    """Return a copy in the host's memory, in place of an old one where it has the same shape."""
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        return {key: _copied(below, before.get(key)) for key, below in value.items()}
    if isinstance(value, list):
        known = old if isinstance(old, list) and len(old) == len(value) else [None] * len(value)
        return [_copied(below, each) for below, each in zip(value, known, strict=True)]
    if not isinstance(value, Tensor):
        return value
    fits = isinstance(old, Tensor) and type(old) is type(value) and old.shape == value.shape
    if fits and old.dtype == value.dtype:
        return old.copy_(value.detach())
    return value.detach().to("cpu", copy=True)


def read(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    strict: bool,
    frozen: bool = True,
) -> None:
    """Restore model and optimizer in place, divided as they are now; every rank calls it.

    Args:
        folder: what `write` wrote.
        model: the module.
        optimizer: the one that trains it, or None to leave it as it is.
        strict: whether the folder may have no more than the model.
        frozen: whether parameters that need no gradients must be there; else those that are not
            stay as they are.

    Raises:
        CheckpointError: they are another model's; the message has the first key that differs.
    """
    state = _state_of(model, optimizer)
    theirs = {
        name.removeprefix(_MODEL): of
        for name, of in _saved_tensors(folder).items()
        if name.startswith(_MODEL)
    }
    if not frozen:
        absent = _frozen(model) - theirs.keys()
        state["model"] = {key: of for key, of in state["model"].items() if key not in absent}
    _refuse_another_model(folder, state["model"], theirs, strict=strict)
    options = StateDictOptions(strict=strict and frozen)
    places = _leaves(state)
    own = {name: holder[key] for name, holder, key in places if isinstance(holder[key], Tensor)}
    with _quietly():
        load(own, storage_reader=ShardReader(folder), no_dist=not dist.is_initialized())
    saved = read_values(folder / VALUES)
    for name, holder, key in places:
        if name in saved:
            holder[key] = saved[name]
    if optimizer is None:
        set_model_state_dict(model, state["model"], options=options)
    else:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the model's tensors of a checkpoint, each whole."""
    weights: dict[str, Any] = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in _saved_tensors(folder).items()
        if name.startswith(_MODEL)
    }
    with _quietly():
        load(weights, storage_reader=ShardReader(folder), no_dist=True)
    return {name.removeprefix(_MODEL): tensor for name, tensor in weights.items()}


def export(place: Path, path: Path) -> tuple[int, int]:
    """Write the model's tensors to a file; return how many there are, and their bytes.

    Raises:
        OSError: there is no space, or it cannot be written there.
    """
    weights = read_weights(place)
    write_tensors(path, weights)
    return len(weights), sum(tensor.nbytes for tensor in weights.values())


def _state_of(
    model: nn.Module, optimizer: Optimizer | None, *, frozen: bool = True
) -> dict[str, Any]:
    if optimizer is None:
        return {"model": get_model_state_dict(model)}
    weights, states = get_state_dict(model, optimizer)
    if not frozen:
        left_out = _frozen(model)
        weights = {key: of for key, of in weights.items() if key not in left_out}
    return {"model": weights, "optimizer": states}


def _frozen(model: nn.Module) -> set[str]:
    """Return every name of the parameters that need no gradients; tied ones have several."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _write(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    leaves = {name: holder[key] for name, holder, key in _leaves(state)}
    alone = not dist.is_initialized()
    with _quietly():
        save(
            {name: value for name, value in leaves.items() if isinstance(value, Tensor)},
            storage_writer=ShardWriter(folder),
            process_group=group,
            no_dist=alone,
        )
    # Behind what needs every rank: one that fails before would leave the others waiting there.
    if alone or dist.get_rank() == 0:
        values = {name: value for name, value in leaves.items() if not isinstance(value, Tensor)}
        write_values(folder / VALUES, values)


def _leaves(holder: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return the dotted name, the holder and the key of everything that holds nothing else."""
    found = []
    for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        name = f"{prefix}{key}"
        divides = isinstance(value, list) and any(isinstance(each, dict | Tensor) for each in value)
        if isinstance(value, dict) or divides:
            found += _leaves(value, f"{name}.")
        else:
            found.append((name, holder, key))
    return found


def _refuse_another_model(
    folder: Path, own: dict[str, Any], theirs: dict[str, TensorStorageMetadata], *, strict: bool
) -> None:
    for key, tensor in own.items():
        if not isinstance(tensor, Tensor):
            continue
        if key not in theirs:
            problem = f"has no `{key}`"
        elif tuple(theirs[key].size) != tuple(tensor.shape):
            shapes = f"{tuple(theirs[key].size)} in it and {tuple(tensor.shape)} here"
            problem = f"has another `{key}`: {shapes}"
        else:
            continue
        raise CheckpointError(f"{folder} must be of this model, but {problem}.")
    more = [key for key in theirs if key not in own]
    if more and strict:
        raise CheckpointError(f"{folder} must be of this model, but also has `{more[0]}`.")


def _saved_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    found: Any = ShardReader(folder).read_metadata().state_dict_metadata
    return dict(found)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Leave out torch's warning that there is no process group, where one process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
        yield

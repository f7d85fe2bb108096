"""Save the model and the optimizer to sharded files, and load them at any world size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from engine.checkpoint.deepspeed_files import DeepSpeedFiles, SavedTensor, has_deepspeed_files
from engine.checkpoint.host_copies import copy_to_host, find_waiting
from engine.checkpoint.optimizer_state import (
    VALUES,
    build_empty_state,
    check_optimizer_state,
    find_outside_parameters,
    get_optimizer_state,
    load_optimizer_state,
)
from engine.checkpoint.plain_values import read_as, report_damage, write_values
from engine.checkpoint.safetensors_storage import SHARDS, ShardReader, ShardWriter, write_tensors
from engine.errors import CheckpointError

__all__ = ["Source", "check_weights", "export", "read", "write", "write_async"]

_MODEL = "model."


class Source(Protocol):
    """Protocol for checkpoint contents that `read` can restore."""

    @property
    def tensors(self) -> Mapping[str, TensorStorageMetadata]:
        """The size and the dtype of each tensor, by dotted name."""
        ...

    @property
    def values(self) -> Mapping[str, Any]:
        """The values that are not tensors, by dotted name."""
        ...

    def load(self, own: dict[str, Any]) -> None:
        """Load the saved tensors into the tensors with the same names in ``own``.

        Every rank must call this method.
        """
        ...


class _Shards:
    """The contents of a checkpoint that `write` saved."""

    def __init__(self, directory: Path) -> None:
        self._reader = ShardReader(directory)
        self.tensors: Mapping[str, Any] = self._reader.read_metadata().state_dict_metadata
        self.values = read_as(dict[str, Any], directory / VALUES)

    def load(self, own: dict[str, Any]) -> None:
        _load_tensors(self._reader, own, is_single_process=not dist.is_initialized())


def write(directory: Path, model: nn.Module, optimizer: Optimizer, *, frozen: bool = True) -> None:
    """Write this rank's shards of the model and the optimizer to a directory.

    Every rank must call this function.

    Args:
        directory: existing directory to write to.
        model: model to save.
        optimizer: optimizer of the model.
        frozen: whether to include frozen parameters.
    """
    _write(directory, _get_state(model, optimizer, frozen=frozen))


def write_async(
    directory: Path,
    model: nn.Module,
    optimizer: Optimizer,
    group: dist.ProcessGroup | None,
    buffers: dict[str, Any],
    *,
    frozen: bool = True,
) -> Future[None]:
    """Copy this rank's shards to host memory, and write the copies in the background.

    Every rank must call this function. Training can continue as soon as the function returns, even
    if GPU tensors are still being copied. The background thread waits for these copies before it
    writes them.

    Args:
        directory: existing directory to write to.
        model: model to save.
        optimizer: optimizer of the model.
        group: process group that is used only for saving; None for a single process.
        buffers: dict in which this function stores the copies, so that the next save can reuse
            their memory. Pass an empty dict to the first save.
        frozen: whether to include frozen parameters.

    Returns:
        A future that completes when all ranks have written their shards and, on rank 0, the file
        `VALUES` has been written.
    """
    state = _get_state(model, optimizer, frozen=frozen)
    copies = copy_to_host(state, buffers)
    buffers.update(copies)
    wait = find_waiting(state)

    def write_copies() -> None:
        wait()
        _write(directory, copies, group)

    writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    started = writer.submit(write_copies)
    writer.shutdown(wait=False)
    return started


def read(
    directory: Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    strict: bool,
    frozen: bool = True,
    source: Source | None = None,
) -> None:
    """Restore a model and its optimizer in place, with their current sharding.

    Every rank must call this function.

    Args:
        directory: directory of the checkpoint.
        model: model to restore.
        optimizer: optimizer to restore; None restores only the model.
        strict: whether the checkpoint and the model must have the same parameters and buffers. If
            False, tensors without a counterpart are ignored.
        frozen: whether the checkpoint must contain the frozen parameters. If False, frozen
            parameters that are missing from the checkpoint keep their current values.
        source: contents of the checkpoint; None to read the files that `write` wrote to
            ``directory``.

    Raises:
        CheckpointError: if the checkpoint is incomplete or damaged, or does not match the model
            or the optimizer.
    """
    source = source or _Shards(directory)
    weights = _find_saved_weights(directory, model, source, strict=strict, frozen=frozen)
    extra = _find_extra_states(directory, weights, source.values)
    state: dict[str, Any] = {"optimizer": {}, "outside": {}}
    if optimizer is not None:
        state = _read_optimizer(directory, model, optimizer, source)
    # The run is still unchanged. After this line, only code of the model or optimizer can fail.
    options = StateDictOptions(strict=strict and frozen)
    try:
        with report_damage(directory / VALUES):
            if extra:
                set_model_state_dict(model, weights | extra, options=options)
            if optimizer is not None:
                load_optimizer_state(model, optimizer, state["optimizer"])
    except CheckpointError:
        if extra:
            set_model_state_dict(model, weights, options=options)
        raise
    source.load(_find_tensors({"model": weights}))
    set_model_state_dict(model, weights | extra, options=options)
    if optimizer is not None:
        for name, parameter in find_outside_parameters(model, optimizer).items():
            if name in state["outside"]:
                parameter.data.copy_(state["outside"][name])


def _find_saved_weights(
    directory: Path, model: nn.Module, source: Source, *, strict: bool, frozen: bool
) -> dict[str, Any]:
    """Return the entries of the model's state dict that `read` must restore.

    Raises:
        CheckpointError: if the checkpoint does not match the model.
    """
    weights: dict[str, Any] = get_model_state_dict(model)
    saved = {
        name.removeprefix(_MODEL): torch.empty(
            metadata.size, dtype=metadata.properties.dtype, device="meta"
        )
        for name, metadata in source.tensors.items()
        if name.startswith(_MODEL)
    }
    if not (strict and frozen):
        absent = {
            key for key in weights.keys() - saved.keys() if f"{_MODEL}{key}" not in source.values
        }
        if strict:
            absent &= _find_frozen_names(model)
        weights = {key: value for key, value in weights.items() if key not in absent}
    own = {key: value for key, value in weights.items() if _is_sharded(key, value)}
    check_weights(directory, own, saved, strict=strict)
    return weights


def _read_optimizer(
    directory: Path, model: nn.Module, optimizer: Optimizer, source: Source
) -> dict[str, Any]:
    """Read the optimizer state, and the optimizer's parameters that are not in the model."""
    with report_damage(directory / VALUES):
        saved = {**source.values, **source.tensors}
        own = build_empty_state(directory, model, optimizer, saved)
    outside = {
        name: torch.empty_like(parameter)
        for name, parameter in find_outside_parameters(model, optimizer).items()
        if f"outside.{name}" in source.tensors
    }
    state = {"optimizer": own, "outside": outside}
    source.load(_find_tensors(state))
    check_optimizer_state(directory, model, optimizer, own)
    return state


def _find_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of a nested state, by dotted name."""
    return {
        name: holder[key]
        for name, holder, key in _find_leaves(state)
        if _is_sharded(name, holder[key])
    }


def _find_extra_states(
    directory: Path, model_state: Mapping[str, Any], saved_values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the saved extra state of each module, by its key in the model's state dict."""
    names = [name for name in model_state if _is_extra_state(name)]
    for name in names:
        if f"{_MODEL}{name}" not in saved_values:
            raise CheckpointError(
                f"{directory} does not match the model: `{name}` is missing from the checkpoint. "
                "Use the model architecture of the saved run, or save this run to another "
                "directory."
            )
    return {name: saved_values[f"{_MODEL}{name}"] for name in names}


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return the model's full (unsharded) parameters and buffers from a checkpoint, by name."""
    if has_deepspeed_files(directory):
        found = DeepSpeedFiles(directory).find_weights()
        # Each tensor needs its own memory in a safetensors file.
        return {k: v.read().clone() for k, v in found.items() if isinstance(v, SavedTensor)}
    reader = ShardReader(directory)
    saved: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    weights: dict[str, Any] = {
        name: torch.empty(metadata.size, dtype=metadata.properties.dtype)
        for name, metadata in saved.items()
        if name.startswith(_MODEL)
    }
    _load_tensors(reader, weights, is_single_process=True)
    return {name.removeprefix(_MODEL): tensor for name, tensor in weights.items()}


def export(checkpoint_dir: Path, path: Path) -> tuple[int, int]:
    """Export the model's parameters and buffers from a checkpoint to one safetensors file.

    Args:
        checkpoint_dir: directory of the checkpoint.
        path: file to write.

    Returns:
        The number of exported tensors, and their total size in bytes.

    Raises:
        OSError: if the disk is full or the file is not writable.
    """
    weights = read_weights(checkpoint_dir)
    write_tensors(path, weights)
    return len(weights), sum(tensor.nbytes for tensor in weights.values())


def _get_state(model: nn.Module, optimizer: Optimizer, *, frozen: bool) -> dict[str, Any]:
    weights = get_model_state_dict(model)
    if not frozen:
        excluded = _find_frozen_names(model)
        weights = {key: value for key, value in weights.items() if key not in excluded}
    return {
        "model": weights,
        "optimizer": get_optimizer_state(model, optimizer),
        "outside": find_outside_parameters(model, optimizer),
    }


def _find_frozen_names(model: nn.Module) -> set[str]:
    """Return the names of all frozen parameters, including every name of a tied parameter."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _write(directory: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    leaves = {name: holder[key] for name, holder, key in _find_leaves(state)}
    is_single_process = not dist.is_initialized()
    tensors = {name: value for name, value in leaves.items() if _is_sharded(name, value)}
    writer = ShardWriter(directory)
    if is_single_process:
        writer.write_whole(tensors)
    else:
        with _raise_cause():
            save(tensors, storage_writer=writer, process_group=group)
    # Write this file after the collective `save`. If rank 0 failed before `save`, the remaining
    # ranks would wait in `save` indefinitely.
    if is_single_process or dist.get_rank() == 0:
        values = {name: value for name, value in leaves.items() if not _is_sharded(name, value)}
        write_values(directory / VALUES, values)


def _load_tensors(reader: ShardReader, own: dict[str, Any], *, is_single_process: bool) -> None:
    """Load saved tensors into the tensors with the same names in ``own``."""
    with report_damage(reader.directory / SHARDS), _raise_cause():
        if is_single_process:
            reader.read_whole(own)
        else:
            load(own, storage_reader=reader)


@contextlib.contextmanager
def _raise_cause() -> Iterator[None]:
    """Replace torch's `CheckpointException` with the error of the lowest-numbered failed rank.

    A `CheckpointException` contains the exceptions of all failed ranks. The class does not derive
    from `Exception`, so ``except Exception`` would not catch it.
    """
    try:
        yield
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        raise cause from None


def _find_leaves(holder: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted name, container, key) for each leaf of a nested state dict."""
    found = []
    for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        name = f"{prefix}{key}"
        is_nested = isinstance(value, list) and any(isinstance(v, dict | Tensor) for v in value)
        if (isinstance(value, dict) or is_nested) and not _is_extra_state(name):
            found += _find_leaves(value, f"{name}.")
        else:
            found.append((name, holder, key))
    return found


def _is_sharded(name: str, value: Any) -> bool:
    """Return whether a value belongs in the sharded files, not in the file `VALUES`."""
    return isinstance(value, Tensor) and not _is_extra_state(name)


def _is_extra_state(name: str) -> bool:
    """Return whether a state dict entry is the result of a module's ``get_extra_state``.

    Such an entry is saved as a whole, because its structure can change between saving and loading.
    """
    return name.rpartition(".")[2] == "_extra_state"


def check_weights(
    directory: Path, own: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, strict: bool
) -> None:
    """Check that the tensors in a checkpoint match the model's parameters and buffers.

    Args:
        directory: directory of the checkpoint, for the error message.
        own: parameters and buffers that the checkpoint must contain, by name.
        saved: meta tensors with the shapes and dtypes of the saved tensors, by name.
        strict: whether the model must contain all saved tensors.

    Raises:
        CheckpointError: if a tensor is missing or unexpected, or if its shape or kind of dtype
            (floating-point or not) differs.
    """
    for key, tensor in own.items():
        if key not in saved:
            problem = f"`{key}` is missing from the checkpoint"
        elif saved[key].shape != tensor.shape:
            shape, own_shape = tuple(saved[key].shape), tuple(tensor.shape)
            problem = f"`{key}` has shape {shape} in the checkpoint but {own_shape} in the model"
        elif saved[key].is_floating_point() != tensor.is_floating_point():
            dtype = saved[key].dtype
            problem = f"`{key}` has dtype {dtype} in the checkpoint but {tensor.dtype} in the model"
        else:
            continue
        raise CheckpointError(
            f"{directory} does not match the model: {problem}. Use the model architecture of the "
            "saved run, or save this run to another directory."
        )
    extra = [key for key in saved if key not in own]
    if extra and strict:
        raise CheckpointError(
            f"{directory} does not match the model: the model has no `{extra[0]}`. Use the model "
            "architecture of the saved run, or pass `load_module_strict=False` to ignore saved "
            "tensors that the model does not have."
        )

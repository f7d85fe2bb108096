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
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
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

from engine.checkpoint.envelope import CheckpointError

__all__ = ["quietly", "read", "write", "write_behind"]


def write(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write this rank's share of model and optimizer; every rank calls it."""
    weights, states = get_state_dict(model, optimizer)
    with quietly():
        save(
            {"model": weights, "optimizer": states},
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True),
            no_dist=not dist.is_initialized(),
        )


def write_behind(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    group: dist.ProcessGroup | None,
    arena: dict[str, Any],
) -> Future[None]:
    """Copy this rank's share, and write the copy while training goes on; every rank calls it.

    Args:
        folder: where to write.
        model: copied as it is now.
        optimizer: copied as it is now.
        group: a process group that nothing else uses; None in one process.
        arena: the copies of the last time, whose memory is used again.

    Returns:
        What is done when this rank, and on rank 0 every rank, has written.
    """
    weights, states = get_state_dict(model, optimizer)
    copies = _copied({"model": weights, "optimizer": states}, arena)
    arena.update(copies)

    def write_copies() -> None:
        with quietly():
            save(
                copies,
                storage_writer=FileSystemWriter(folder, single_file_per_rank=True),
                process_group=group,
                no_dist=group is None,
            )

    writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    started = writer.submit(write_copies)
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
    if not isinstance(value, torch.Tensor):
        return value
    fits = isinstance(old, torch.Tensor) and type(old) is type(value) and old.shape == value.shape
    if fits and old.dtype == value.dtype:
        return old.copy_(value.detach())
    return value.detach().to("cpu", copy=True)


def read(folder: Path, model: nn.Module, optimizer: Optimizer | None, *, strict: bool) -> None:
    """Restore model and optimizer in place, divided as they are now; every rank calls it.

    Raises:
        CheckpointError: they are another model's; the message has the first key that differs.
    """
    options = StateDictOptions(strict=strict)
    state: dict[str, Any]
    if optimizer is None:
        state = {"model": get_model_state_dict(model)}
    else:
        weights, states = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": states}
    _refuse_another_model(folder, state["model"], strict=strict)
    with quietly():
        load(state, storage_reader=FileSystemReader(folder), no_dist=not dist.is_initialized())
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


def _refuse_another_model(folder: Path, own: dict[str, Any], *, strict: bool) -> None:
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    theirs = {
        key.removeprefix("model."): of for key, of in saved.items() if key.startswith("model.")
    }
    for key, tensor in own.items():
        if key not in theirs:
            problem = f"has no `{key}`"
        elif tuple(theirs[key].size) != tuple(tensor.shape):  # type: ignore[union-attr]  # tensors
            shapes = f"{tuple(theirs[key].size)} in it and {tuple(tensor.shape)} here"  # type: ignore[union-attr]
            problem = f"has another `{key}`: {shapes}"
        else:
            continue
        raise CheckpointError(f"{folder} must be of this model, but {problem}.")
    more = [key for key in theirs if key not in own]
    if more and strict:
        raise CheckpointError(f"{folder} must be of this model, but also has `{more[0]}`.")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Leave out the checksums inside of torch's files: the manifest hashes each file as a whole.

    torch also warns that there is no process group, where one process needs none.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
            yield
    finally:
        torch.serialization.set_crc32_options(before)

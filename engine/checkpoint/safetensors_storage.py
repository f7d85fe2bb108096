"""Write and read one safetensors file per rank with torch.distributed.checkpoint.

An unsharded tensor is stored under its own name, so that any safetensors reader can load it. A
shard of a tensor is stored under ``name@offset,…``, and the header of its file contains the shape
of the full tensor. The files contain no pickled objects, so opening one never runs code.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import struct
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from engine.checkpoint.plain_values import report_damage
from schedules.core.saved_state import Count, restore

__all__ = ["SHARDS", "ShardReader", "ShardWriter", "write_tensors"]


SHARDS = "shard.*.safetensors"
"""Glob pattern that matches the safetensors files of a checkpoint, one per rank."""
_ALIGNMENT = 8  # bytes
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""Maps each torch dtype to its name in the header of a safetensors file."""


class ShardWriter(StorageWriter):
    """Storage writer that writes each rank's tensors to ``shard.RANK.safetensors``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing, because the writer always uses the same directory."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing. The writer does not need any setup."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Store the rank in each plan, so that `write_data` can name the rank's file."""
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the planned tensors to this rank's file, and return a completed future."""
        tensors: dict[str, Tensor] = {}
        parts: dict[str, Any] = {}
        results = []
        for item in plan.items:
            assert item.tensor_data is not None  # callers pass only tensors
            tensor: Any = planner.resolve_data(item)
            name, chunk, whole = item.index.fqn, item.tensor_data.chunk, item.tensor_data.size
            if chunk.sizes != whole:
                offsets = list(chunk.offsets)
                key, name = name, f"{name}@{','.join(map(str, offsets))}"
                parts[name] = {"of": key, "shape": list(whole), "offsets": offsets}
            tensors[name] = tensor
            results.append(WriteResult(item.index, tensor.nbytes, None))
        self._write_shard(plan.storage_data, tensors, parts)
        return _wrap_in_future(results)

    def write_whole(self, tensors: dict[str, Tensor]) -> None:
        """Write unsharded tensors to a single file, without torch's slow save planner."""
        self._write_shard(0, tensors, {})

    def _write_shard(self, rank: int, tensors: dict[str, Tensor], parts: dict[str, Any]) -> None:
        path = self._directory / f"shard.{rank}.safetensors"
        write_tensors(path, tensors, {"parts": json.dumps(parts)})

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing. The headers of the shard files contain the metadata."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether the checkpoint ID is the path of an existing directory."""
        return Path(checkpoint_id).is_dir()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, one tensor at a time.

    ``safetensors.torch.save_file`` takes twice as long and needs twice the memory, because it first
    copies all tensors.

    Args:
        path: file to write.
        tensors: tensors by name, on any device.
        metadata: strings to store in the file's header.

    Raises:
        OSError: if the disk is full or the file is not writable.
        ValueError: if a tensor has a dtype that the format does not support.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Tensors with large items come first, so that all items are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"`{name}` must have a dtype that safetensors supports, got {tensor.dtype}. "
                "Convert the tensor, for example to float32."
            )
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    try:
        with path.open("wb", buffering=0) as file:
            _write_all(file, struct.pack("<Q", len(text)) + text)
            for name in names:
                tensor = tensors[name].detach().resolve_conj().resolve_neg()
                items = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
                _write_all(file, items.numpy())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _write_all(file: FileIO, data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class ShardReader(StorageReader):
    """Storage reader for files that `ShardWriter` wrote, possibly at a different world size.

    A rank reads only the saved shards that overlap its own shards.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """Directory of the checkpoint."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing, because the reader always uses the same directory."""

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """Return the shapes of the saved tensors, and the offsets and location of each shard.

        Raises:
            CheckpointError: if a file is damaged.
        """
        return self._metadata

    def read_whole(self, targets: Mapping[str, Tensor]) -> None:
        """Fill each unsharded target with the saved tensor of the same name.

        torch's load planner is not used, because it is slow.

        Raises:
            KeyError: if a tensor is not in the checkpoint.
            ValueError: if a tensor has a different shape in the checkpoint.
        """
        slices: dict[Path, list[tuple[str, Tensor]]] = {}
        for name, target in targets.items():
            saved = self._metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)
            if saved.size != target.shape:
                raise ValueError(
                    f"`{name}` must have shape {tuple(target.shape)}, got {tuple(saved.size)} in "
                    "the checkpoint."
                )
            for chunk in saved.chunks:
                path, key = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                part = target.detach()
                for dimension, span in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                    part = part.narrow(dimension, *span)
                slices.setdefault(path, []).append((key, part))
        for path, items in slices.items():
            with safe_open(path, framework="pt") as file:
                for key, part in items:
                    part.copy_(file.get_tensor(key))

    @functools.cached_property
    def _metadata(self) -> Metadata:
        known: dict[str, TensorStorageMetadata] = {}
        locations: dict[MetadataIndex, tuple[Path, str]] = {}
        for path in sorted(self.directory.glob(SHARDS)):
            with report_damage(path):
                _read_header(path, known, locations)
        with report_damage(self.directory / SHARDS):
            for name, whole in known.items():
                _check_parts(name, whole)
        return Metadata(dict(known), storage_data=locations)

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,  # noqa: ARG002  # torch passes it by this name
        *_args: Any,
        **_options: Any,
    ) -> None:
        """Keep the shard locations from the metadata that `read_metadata` returned."""
        self._locations = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the planned slices into this rank's tensors, and return a completed future."""
        items_by_file: dict[Path, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            path, name = self._locations[item.storage_index]
            items_by_file.setdefault(path, []).append((name, item))
        for path, items in items_by_file.items():
            with safe_open(path, framework="pt") as file:
                for name, item in items:
                    tensor = file.get_tensor(name)
                    spans = zip(item.storage_offsets, item.lengths, strict=True)
                    for dimension, (offset, length) in enumerate(spans):
                        tensor = tensor.narrow(dimension, offset, length)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(tensor)
                    planner.commit_tensor(item, target)
        return _wrap_in_future(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether the checkpoint ID is the path of an existing directory."""
        return Path(checkpoint_id).is_dir()


@dataclasses.dataclass(frozen=True)
class _Part:
    """The position of a shard in its full tensor, as stored in the header of the shard's file."""

    of: str
    shape: tuple[Count, ...]
    offsets: tuple[Count, ...]


def _read_header(
    path: Path,
    known: dict[str, TensorStorageMetadata],
    locations: dict[MetadataIndex, tuple[Path, str]],
) -> None:
    """Add a file's tensors to ``known``, and the locations of their shards to ``locations``."""
    with safe_open(path, framework="pt") as file:
        found = json.loads((file.metadata() or {}).get("parts", "{}"))
        parts = restore(dict[str, _Part], found, "parts")
        for name in file.keys():  # noqa: SIM118  # the file is not iterable
            tensor = file.get_tensor(name)
            part = parts.get(name, _Part(name, tuple(tensor.shape), (0,) * tensor.dim()))
            offsets = torch.Size(part.offsets)
            whole = known.setdefault(
                part.of,
                TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype), torch.Size(part.shape), []
                ),
            )
            if (whole.size, whole.properties.dtype) != (torch.Size(part.shape), tensor.dtype):
                raise ValueError(
                    f"the saved shards of `{part.of}` disagree on the tensor's full shape or dtype."
                )
            whole.chunks.append(ChunkStorageMetadata(offsets, tensor.shape))
            locations[MetadataIndex(part.of, offsets)] = (path, name)


def _check_parts(name: str, whole: TensorStorageMetadata) -> None:
    """Check that the saved shards of a tensor cover the whole tensor exactly once.

    Raises:
        ValueError: if a shard is missing, repeated, or outside the tensor.
    """
    chunks = sorted(whole.chunks, key=lambda chunk: tuple(chunk.offsets))
    is_covered = sum(chunk.sizes.numel() for chunk in chunks) == whole.size.numel()
    for chunk, after in itertools.zip_longest(chunks, chunks[1:]):
        ends = [start + size for start, size in zip(chunk.offsets, chunk.sizes, strict=False)]
        is_inside = len(chunk.offsets) == len(chunk.sizes) == len(whole.size) and all(
            end <= size for end, size in zip(ends, whole.size, strict=False)
        )
        # Parts that follow each other in one dimension must not overlap.
        differing = (
            []
            if after is None
            else [
                end <= start
                for end, old, start in zip(ends, chunk.offsets, after.offsets, strict=False)
                if start != old
            ]
        )
        is_covered &= is_inside and (len(differing) != 1 or differing[0])
    if not is_covered:
        raise ValueError(
            f"the saved shards of `{name}` do not cover the full tensor of shape "
            f"{tuple(whole.size)} exactly once."
        )


def _wrap_in_future(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future

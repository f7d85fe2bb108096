"""Where torch.distributed.checkpoint puts tensors here: one safetensors file a rank, no pickles.

A tensor that a rank has as a whole stands under its own name, so that any reader of safetensors
finds it; a part of a divided one stands under ``name@offset,…``, and the file's metadata has the
shape of the whole. The files need no index beside them, and opening one runs nobody's code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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

__all__ = ["ShardReader", "ShardWriter", "write_tensors"]


class ShardWriter(StorageWriter):
    """Writes each rank's tensors into ``shard.RANK.safetensors`` of a folder that is there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer writes once, into its folder."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is no state."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Take the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank the number of its file."""
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        tensors: dict[str, Tensor] = {}
        parts: dict[str, Any] = {}
        results = []
        stored: set[int] = set()
        for item in plan.items:
            assert item.tensor_data is not None  # values that are no tensors do not come here
            tensor = planner.resolve_data(item).detach().cpu().contiguous()  # type: ignore[union-attr]  # BytesIO is for values
            if tensor.data_ptr() in stored:
                tensor = tensor.clone()  # one that is tied to another: a file has each name's own
            stored.add(tensor.data_ptr())
            name, chunk, whole = item.index.fqn, item.tensor_data.chunk, item.tensor_data.size
            if chunk.sizes != whole:
                offsets = list(chunk.offsets)
                key, name = name, f"{name}@{','.join(map(str, offsets))}"
                parts[name] = {"of": key, "shape": list(whole), "offsets": offsets}
            tensors[name] = tensor
            results.append(WriteResult(item.index, tensor.nbytes, None))
        path = self._folder / f"shard.{plan.storage_data}.safetensors"
        write_tensors(path, tensors, {"parts": json.dumps(parts)})
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: the files say themselves what they hold."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say yes to any folder."""
        return Path(checkpoint_id).is_dir()


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: there is no space, or it cannot be written there; safetensors has an error of its
            own for that.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


class ShardReader(StorageReader):
    """Reads what any number of ranks wrote, tensor by tensor, each part where it is wanted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader has one folder."""

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """Return what tensors there are, in which parts, and which file has each."""
        known: dict[str, TensorStorageMetadata] = {}
        places: dict[MetadataIndex, tuple[Path, str]] = {}
        for path in sorted(self._folder.glob("shard.*.safetensors")):
            with safe_open(path, framework="pt") as file:
                parts = json.loads((file.metadata() or {}).get("parts", "{}"))
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    tensor = file.get_tensor(name)
                    part = parts.get(name, {"of": name, "shape": tensor.shape})
                    offsets = torch.Size(part.get("offsets", [0] * tensor.dim()))
                    whole = known.setdefault(
                        part["of"],
                        TensorStorageMetadata(
                            TensorProperties(dtype=tensor.dtype), torch.Size(part["shape"]), []
                        ),
                    )
                    whole.chunks.append(ChunkStorageMetadata(offsets, tensor.shape))
                    places[MetadataIndex(part["of"], offsets)] = (path, name)
        return Metadata(dict(known), storage_data=places)

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,  # noqa: ARG002  # torch's name for it
        *_args: Any,
        **_options: Any,
    ) -> None:
        """Remember which file has which part."""
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Take the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Take the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what this rank wants into its own tensors."""
        of_files: dict[Path, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            path, name = self._places[item.storage_index]
            of_files.setdefault(path, []).append((name, item))
        for path, wanted in of_files.items():
            with safe_open(path, framework="pt") as file:
                for name, item in wanted:
                    tensor = file.get_tensor(name)
                    spans = zip(item.storage_offsets, item.lengths, strict=True)
                    for dimension, (offset, length) in enumerate(spans):
                        tensor = tensor.narrow(dimension, offset, length)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(tensor)
                    planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say yes to any folder."""
        return Path(checkpoint_id).is_dir()


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future

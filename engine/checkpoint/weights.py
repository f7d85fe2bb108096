"""The weights of a checkpoint as one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from engine.checkpoint.tensors import quietly

__all__ = ["export"]


def export(place: Path, path: Path) -> tuple[int, int]:
    """Write the model's tensors to a file; return how many there are, and their bytes."""
    reader = FileSystemReader(place)
    model: dict[str, Any] = {
        key.removeprefix("model."): torch.empty(of.size, dtype=of.properties.dtype)
        for key, of in reader.read_metadata().state_dict_metadata.items()
        if key.startswith("model.") and isinstance(of, TensorStorageMetadata)
    }
    with quietly():
        load({"model": model}, storage_reader=FileSystemReader(place), no_dist=True)
    save_file(model, path)
    return len(model), sum(tensor.nbytes for tensor in model.values())

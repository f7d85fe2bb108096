"""The weights of a checkpoint as one safetensors file."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.shards import write_tensors
from engine.checkpoint.tensors import read_weights

__all__ = ["export"]


def export(place: Path, path: Path) -> tuple[int, int]:
    """Write the model's tensors to a file; return how many there are, and their bytes.

    Raises:
        OSError: there is no space, or it cannot be written there.
    """
    weights = read_weights(place)
    write_tensors(path, weights)
    return len(weights), sum(tensor.nbytes for tensor in weights.values())

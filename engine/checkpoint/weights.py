"""The weights of a checkpoint as one safetensors file."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from engine.checkpoint.tensors import read_weights

__all__ = ["export"]


def export(place: Path, path: Path) -> tuple[int, int]:
    """Write the model's tensors to a file; return how many there are, and their bytes."""
    weights = read_weights(place)
    save_file(weights, path)
    return len(weights), sum(tensor.nbytes for tensor in weights.values())

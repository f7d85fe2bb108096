"""Plain values and small tensors in a file; reading one runs nobody's code."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.envelope import CheckpointError

__all__ = ["read_values", "write_values"]


def write_values(path: Path, values: Any) -> None:
    """Write numbers, text, tensors, and lists and mappings of them.

    Raises:
        OSError: there is no space, or the folder cannot be written. (torch's own writer would say
            neither.)
    """
    buffer = io.BytesIO()
    torch.save(values, buffer)
    path.write_bytes(buffer.getbuffer())


def read_values(path: Path) -> Any:
    """Return what `write_values` wrote, its tensors in the host's memory.

    Raises:
        CheckpointError: the file holds anything else, as code to be run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds `{named.group(1)}`" if named else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} must hold tensors and plain values, nothing else is unpickled, but {what}."
        ) from None

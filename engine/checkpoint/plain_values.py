"""Plain values and small tensors in a file; reading one runs nobody's code."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError

__all__ = ["read_values", "refuse_objects", "write_values"]


def write_values(path: Path, values: Any) -> None:
    """Write numbers, text, tensors, and lists and mappings of them.

    Raises:
        OSError: there is no space, or the folder cannot be written. (torch's own writer would say
            neither.)
    """
    buffer = io.BytesIO()
    torch.save(values, buffer)
    path.write_bytes(buffer.getbuffer())


def refuse_objects(values: Mapping[str, Any], name: str) -> None:
    """Refuse what `write_values` would write and `read_values` would not read.

    Raises:
        ValueError: a value is, or holds, an object of a class of its own.

    >>> refuse_objects({"epoch": 3}, "client_state")
    """
    for key, value in values.items():
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  # pickling runs the objects' own code
            raise ValueError(
                f"`{name}[{key!r}]` must be made of tensors, numbers, text, lists and mappings, "
                f"but is or holds {_what_of(error) or type(value).__name__}; convert it, as by "
                "`float`, `str` or `tolist`."
            ) from None


def _what_of(error: Exception) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"`{named.group(1)}`" if named else ""


def read_values(path: Path) -> Any:
    """Return what `write_values` wrote, its tensors in the host's memory.

    Raises:
        CheckpointError: the file holds anything else, as code to be run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        what = _what_of(error)
        problem = f"it holds {what}" if what else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} must hold tensors and plain values, nothing else is unpickled, but {problem}."
        ) from None

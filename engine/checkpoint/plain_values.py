"""Save and load plain values and small tensors; loading never runs code from the file."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError

__all__ = ["check_plain_values", "read_values", "write_values"]


def write_values(path: Path, values: Any) -> None:
    """Write numbers, strings and tensors, or nested lists and mappings of them, to a file.

    Raises:
        OSError: if the disk is full or the directory is not writable.
    """
    # If torch.save wrote the file, its RuntimeError would not name the cause of a failure.
    buffer = io.BytesIO()
    torch.save(values, buffer)
    path.write_bytes(buffer.getbuffer())


def check_plain_values(values: Mapping[str, Any], name: str) -> None:
    """Check that `read_values` supports the types of all values.

    Args:
        values: mapping whose values are checked.
        name: name of the argument, for the error message.

    Raises:
        ValueError: if a value has or contains an unsupported type.

    >>> check_plain_values({"epoch": 3}, "client_state")
    """
    for key, value in values.items():
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  # custom pickling code can raise anything
            raise ValueError(
                f"`{name}[{key!r}]` must contain only tensors, numbers, strings, lists and "
                f"mappings, got {_find_class_name(error) or type(value).__name__}. Convert it, for "
                "example with `float`, `str` or `tolist`."
            ) from None


def _find_class_name(error: Exception) -> str:
    """Return the name of the class that an unpickling error reports, in backticks.

    If the error does not report a class, return an empty string.
    """
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"`{named.group(1)}`" if named else ""


def read_values(path: Path) -> Any:
    """Return the values that `write_values` wrote, with tensors on the CPU.

    Raises:
        CheckpointError: if the file is damaged, or if it contains objects of other types, which
            could run code when they are unpickled.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        class_name = _find_class_name(error)
        problem = f"it contains {class_name}" if class_name else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be loaded: {problem}. Use another checkpoint. Only tensors and plain "
            "values are loaded, because unpickling other objects can run code."
        ) from None

"""Save plain values and small tensors, and load them without running code from the file."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime as dt
import importlib
import io
import pathlib
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from engine.errors import CheckpointError
from schedules.core.saved_state import restore

__all__ = [
    "check_plain_values",
    "read_as",
    "read_values",
    "report_damage",
    "summarize",
    "unpickle",
    "write_values",
]

_CONTAINERS = (dict, collections.OrderedDict, collections.Counter, argparse.Namespace)
_SEQUENCES = (list, tuple, set, torch.Size)
_SCALARS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    dt.datetime,
    dt.date,
    dt.timedelta,
    dt.timezone,
    type(Path()),
)
_ARRAYS = importlib.import_module(f"numpy.{'_core' if hasattr(np, '_core') else 'core'}.multiarray")
_LOADABLE: list[Any] = [
    _ARRAYS._reconstruct,  # noqa: SLF001  # how numpy stores an array
    _ARRAYS.scalar,
    np.ndarray,
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"),
    argparse.Namespace,
    dt.datetime,
    dt.date,
    dt.timedelta,
    dt.timezone,
    pathlib.PosixPath,
    pathlib.WindowsPath,
]
"""Classes and functions that are safe to unpickle, in addition to those that PyTorch allows."""


def write_values(path: Path, values: Any) -> None:
    """Write ``values`` to a file that `read_values` can load.

    ``values`` can be a plain value (such as a number, a string or a date), a tensor, an array, or a
    list or mapping of these.

    Raises:
        OSError: the disk is full or the directory is not writable.
        ValueError: a value has a type that `read_values` does not load.
    """
    check_plain_values(values, path.stem)
    # torch.save would raise a RuntimeError that does not name the cause of a failure.
    buffer = io.BytesIO()
    torch.save(values, buffer)
    path.write_bytes(buffer.getbuffer())


def check_plain_values(values: Any, name: str) -> None:
    """Check that `read_values` supports the types of all values.

    Args:
        values: a value, or a list or mapping of values, which may be nested.
        name: name of ``values`` in the error message.

    Raises:
        ValueError: a value has an unsupported type.

    >>> check_plain_values({"epoch": 3, "losses": [0.5]}, "client_state")
    """
    for place, value in _find_unsupported(values, name):
        kind = type(value)
        raise ValueError(
            f"`{place}` must be a number, a string, a tensor, an array, or a list or mapping of "
            f"these, got `{kind.__module__}.{kind.__qualname__}`. Convert it, for example with "
            "`float`, `str` or `dict`."
        )


def _find_unsupported(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor) or type(value) in _SCALARS:
        return
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return
    if type(value) in _CONTAINERS:
        items = vars(value) if isinstance(value, argparse.Namespace) else value
        for key, below in items.items():
            yield from _find_unsupported(key, f"key of {name}")
            yield from _find_unsupported(below, f"{name}[{key!r}]")
    elif type(value) in _SEQUENCES:
        for index, below in enumerate(value):
            yield from _find_unsupported(below, f"{name}[{index}]")
    else:
        yield name, value


def read_values(path: Path) -> Any:
    """Return the values in a file that `write_values` wrote, with tensors on the CPU.

    Raises:
        CheckpointError: the file is damaged, or contains an object that is neither a plain value
            nor a tensor. Unpickling such an object could execute arbitrary code.
    """
    with report_damage(path):
        return unpickle(path)


def unpickle(
    path: Any,
    allowed: Iterable[Any] = (),
    *,
    load: Callable[..., Any] = torch.load,
    mmap: bool | None = None,
    fix: str = "Use another checkpoint.",
) -> Any:
    """Load a ``torch.save`` file, but reject objects that could execute code when unpickled.

    All tensors in the result are on the CPU.

    Args:
        path: file to load.
        allowed: classes to allow in addition to tensors and plain values. Each item is a class, or
            a tuple ``(class, name)`` if the file refers to the class by another name.
        load: `torch.load`, or a function with the same arguments.
        mmap: see `torch.load`.
        fix: advice to append to the error message if the file contains a class that is not allowed.

    Raises:
        CheckpointError: the file cannot be unpickled, or contains a class that is not allowed.
    """
    try:
        with safe_globals([*_LOADABLE, *allowed]):
            return load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not named:
            raise CheckpointError(
                f"{path} is damaged: {summarize(error)}. Use another checkpoint."
            ) from error
        raise CheckpointError(
            f"{path} cannot be loaded: it contains `{named[1]}`, which can execute arbitrary "
            f"code when it is unpickled. {fix}"
        ) from None


def summarize(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty.

    For errors other than ValueError and RuntimeError, the type precedes the message. The period at
    the end of the message is removed.

    >>> summarize(KeyError("data.pkl")), summarize(EOFError())
    ("KeyError: 'data.pkl'", 'EOFError')
    """
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))  # in a long text of torch
    if reason:
        return reason[1].strip().rstrip(".")
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[0].rstrip(". ")
    return (
        text if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {text}"
    )


def read_as(kind: Any, path: Path) -> Any:
    """Return the values in a file, and check that they match the type ``kind``.

    Args:
        kind: type annotation of the values; see `schedules.core.saved_state.restore`.
        path: file that `write_values` wrote.

    Raises:
        CheckpointError: the file is damaged, or its values do not match ``kind``.
    """
    values = read_values(path)
    with report_damage(path):
        restore(kind, values, path.name.partition(".")[0])
    return values


@contextlib.contextmanager
def report_damage(path: Path) -> Iterator[None]:
    """Convert any exception in a ``with`` block to a CheckpointError.

    The error reports the file as damaged or missing. A block that fails must leave the state of
    the run unchanged.

    Args:
        path: file that the block reads or checks.
    """
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Use another checkpoint.") from None
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged: {summarize(error)}. Use another checkpoint."
        ) from error

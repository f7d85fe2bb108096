"""Save plain values and small tensors, and load them without running code from the file."""

from __future__ import annotations

import argparse
import array
import collections
import contextlib
import datetime as dt
import importlib
import io
import pathlib
import pickle
import random
import re
import types
import uuid
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from engine.errors import CheckpointError
from schedules.core.saved_state import StateMismatchError, restore

__all__ = [
    "TRUST_FIX",
    "check_plain_values",
    "read_as",
    "read_values",
    "report_damage",
    "summarize",
    "unpickle",
    "write_values",
]

TRUST_FIX = "If you trust the checkpoint, set `engine.checkpoint.trust_pickle` to true."

_NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter, collections.defaultdict)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque, torch.Size)
_SCALARS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    range,
    array.array,
    Decimal,
    Fraction,
    uuid.UUID,
    torch.dtype,
    torch.device,
    dt.date,
    dt.timedelta,
    dt.timezone,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    type(Path()),
    random.Random,
    np.random.SeedSequence,
)
_FACTORIES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    dict,
    set,
    frozenset,
    collections.OrderedDict,
    collections.Counter,
    collections.deque,
    collections.defaultdict,
)
"""Classes that can be the ``default_factory`` of a defaultdict, besides None."""
_BIT_GENERATORS = tuple(
    getattr(np.random, name) for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
)
_ARRAYS = importlib.import_module(f"numpy.{'_core' if hasattr(np, '_core') else 'core'}.multiarray")
_RANDOM_FUNCTIONS = {
    "numpy.random._pickle": (
        "__generator_ctor",
        "__bit_generator_ctor",
        "__randomstate_ctor",
    ),
    "numpy.random.bit_generator": ("__pyx_unpickle_SeedSequence",),
}
"""Functions that build numpy's random generators when they are unpickled, by module."""
_LOADABLE: list[Any] = [
    _ARRAYS._reconstruct,  # noqa: SLF001  # how numpy stores an array
    _ARRAYS.scalar,
    np.ndarray,
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"),
    *(
        (getattr(importlib.import_module(module), name), f"{module}.{name}")
        for module, names in _RANDOM_FUNCTIONS.items()
        for name in names
    ),
    *_BIT_GENERATORS,
    np.random.Generator,
    np.random.RandomState,
    np.random.SeedSequence,
    random.Random,
    torch.Generator,
    *_NAMESPACES,
    *(kind for kind in _FACTORIES if kind not in (collections.deque, collections.defaultdict)),
    range,
    slice,
    array.array,
    Decimal,
    Fraction,
    uuid.UUID,
    dt.datetime,
    dt.date,
    dt.time,
    dt.timedelta,
    dt.timezone,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    pathlib.PosixPath,
    pathlib.WindowsPath,
]
"""Classes and functions that are safe to unpickle, in addition to those that PyTorch allows.

Calling one of them has no side effects, whatever its arguments are.
"""


def write_values(path: Path, values: Any, *, trusts: bool = False) -> None:
    """Write ``values`` to a file that `read_values` can load.

    ``values`` can be a plain value (such as a number, a string or a date), a tensor, an array, or a
    container of these, such as a list or a mapping.

    Args:
        path: file to write.
        values: values to write.
        trusts: whether to pickle objects of other classes, too. `read_values` then loads the file
            only with ``trusts=True``.

    Raises:
        OSError: the disk is full or the directory is not writable.
        ValueError: a value has a type that `read_values` does not load.
    """
    if not trusts:
        check_plain_values(values, path.stem)
    # torch.save would raise a RuntimeError that does not name the cause of a failure.
    buffer = io.BytesIO()
    torch.save(values, buffer)
    path.write_bytes(buffer.getbuffer())


def check_plain_values(values: Any, name: str, fix: str = "") -> None:
    """Check that `read_values` supports the types of all values.

    Args:
        values: a value, or a container of values, which may be nested.
        name: name of ``values`` in the error message.
        fix: second advice of the error message; empty if there is none.

    Raises:
        ValueError: a value has an unsupported type.

    >>> check_plain_values({"epoch": 3, "losses": [0.5]}, "client_state")
    """
    for place, value in _find_unsupported(values, name):
        kind = type(value)
        raise ValueError(
            f"`{place}` must be a plain value such as a number or a string, a tensor, an array, or "
            f"a list or mapping of these, got `{kind.__module__}.{kind.__qualname__}`. Convert it, "
            f"for example with `float`, `str` or `dict`{fix}."
        )


def _find_unsupported(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if isinstance(value, Tensor) or kind in _SCALARS or _is_random_generator(value):
        return
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return
    if kind in _MAPPINGS or kind in _NAMESPACES:
        items = vars(value) if kind in _NAMESPACES else value
        factory = getattr(value, "default_factory", None)
        if factory is not None and factory not in _FACTORIES:
            yield f"{name}.default_factory", factory
        for key, below in items.items():
            yield from _find_unsupported(key, f"key of {name}")
            yield from _find_unsupported(below, f"{name}[{key!r}]")
    elif kind in _SEQUENCES:
        for index, below in enumerate(value):
            yield from _find_unsupported(below, f"{name}[{index}]")
    elif kind is slice:
        for part in ("start", "stop", "step"):
            yield from _find_unsupported(getattr(value, part), f"{name}.{part}")
    elif kind in (dt.datetime, dt.time):
        yield from _find_unsupported(value.tzinfo, f"{name}.tzinfo")
    else:
        yield name, value


def _is_random_generator(value: Any) -> bool:
    """Return whether a value is a random generator of PyTorch's or numpy's own classes."""
    if type(value) is torch.Generator:
        return bool(value.device.type == "cpu")
    if type(value) is np.random.Generator:
        value = value.bit_generator
    elif type(value) is np.random.RandomState:
        value = value._bit_generator  # noqa: SLF001  # it has no public name
    return type(value) in _BIT_GENERATORS


def read_values(path: Path, *, trusts: bool = False, fix: str = "Use another checkpoint.") -> Any:
    """Return the values in a file that `write_values` wrote, with tensors on the CPU.

    Args:
        path: file to load.
        trusts: whether to unpickle objects of any class. Unpickling such objects can execute
            arbitrary code from the file.
        fix: see `unpickle`.

    Raises:
        CheckpointError: the file is damaged, or ``trusts`` is false and the file contains an object
            that is neither a plain value nor a tensor.
    """
    with report_damage(path):
        if trusts:
            return torch.load(path, map_location="cpu", weights_only=False)
        return unpickle(path, fix=fix)


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
    containers = _Containers()
    try:
        with safe_globals([*_LOADABLE, *containers.stand_ins, *allowed]):
            values = load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return containers.convert(values)
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


class _Containers:
    """The deques and default dicts of one file.

    PyTorch's restricted unpickler fills only lists and dicts. Stand-ins of the two classes
    therefore build lists and dicts, and `convert` replaces these after the file is loaded.
    """

    def __init__(self) -> None:
        self._classes: dict[Any, type] = {
            self._start_deque: collections.deque,
            self._start_defaultdict: collections.defaultdict,
        }
        # The dicts hold the values themselves, too, so that no two of them have the same id.
        self._started: dict[int, tuple[Any, Any]] = {}
        self._converted: dict[int, tuple[Any, Any]] = {}

    @property
    def stand_ins(self) -> list[tuple[Any, str]]:
        """Functions to call instead of the classes, each with the name of its class."""
        return [(call, f"collections.{kind.__name__}") for call, kind in self._classes.items()]

    def _start_deque(self, items: Iterable[Any] = (), maxlen: int | None = None) -> list[Any]:
        started = list(items)
        self._started[id(started)] = started, collections.deque(maxlen=maxlen)
        return started

    def _start_defaultdict(self, factory: Any = None, /, *items: Any) -> dict[Any, Any]:
        factory = self._classes.get(factory, factory)
        if factory is not None and factory not in _FACTORIES:
            raise ValueError(f"a defaultdict cannot use {factory!r} as its default_factory")
        started: dict[Any, Any] = dict(*items)
        self._started[id(started)] = started, collections.defaultdict(factory)
        return started

    def convert(self, value: Any) -> Any:
        """Return a loaded value with its deques and default dicts. Other containers are reused."""
        if not self._started:
            return value
        if id(value) in self._converted:
            return self._converted[id(value)][1]
        if type(value) is tuple:
            made: Any = tuple(self.convert(each) for each in value)
            self._converted[id(value)] = value, made
            return made
        _, made = self._started.get(id(value), (value, value))
        self._converted[id(value)] = value, made  # first, because a container can contain itself
        if type(value) is list:
            items = [self.convert(each) for each in value]
            made.clear()
            made.extend(items)
        elif isinstance(value, dict):
            for key, each in list(value.items()):
                made[key] = self.convert(each)
        if isinstance(value, (*_NAMESPACES, collections.OrderedDict)):
            self.convert(vars(value))
        return made


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

    The error reports that the file is damaged or missing, or that an intact state does not match
    this run. A block that fails must leave the state of the run unchanged.

    Args:
        path: file that the block reads or checks.
    """
    try:
        yield
    except CheckpointError:
        raise
    except StateMismatchError as error:
        checkpoint_dir = path if path.is_dir() else path.parent
        raise CheckpointError(
            f"{checkpoint_dir} does not match this run. {error} To change the optimizer before a "
            'checkpoint is loaded, set `engine.checkpoint.resume` to "never", and call '
            "load_checkpoint()."
        ) from error
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Use another checkpoint.") from None
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged: {summarize(error)}. Use another checkpoint."
        ) from error

"""Validate saved values against type annotations, and convert them to the annotated types."""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from schedules.core.fields import Range

__all__ = ["OPTIONAL", "Count", "Size", "StateMismatchError", "describe", "restore"]

Count = Annotated[int, Range(at_least=0)]
"""Type for a count of steps, samples or epochs."""
Size = Annotated[int, Range(at_least=1)]
"""Type for a batch size or a number of ranks."""

_MAX_INT = 2**63 - 1

OPTIONAL = {"optional": True}
"""Metadata for dataclass fields that may be missing from states saved by earlier versions."""

_WORDS = {int: "a 64-bit whole number", float: "a number", bool: "true or false", str: "a string"}


class StateMismatchError(ValueError):
    """Error for a saved state that is intact, but belongs to another schedule or optimizer."""


def restore(kind: Any, value: Any, name: str) -> Any:
    """Convert a saved value to the type ``kind``, and validate it and all nested values.

    Checkpoints contain only plain values, so that loading them cannot run code. A dataclass is
    saved as a dict, a named tuple as a dict or a list, and a tuple as a tuple or a list.

    Args:
        kind: type of the result. It can be an annotation such as ``tuple[float, ...]``, a
            dataclass, or a class with a method ``restore``.
        value: saved value.
        name: name of the value, for the error message.

    Raises:
        ValueError: the value or a nested value has the wrong type or is out of range, or a key is
            missing or unknown.

    >>> restore(dict[str, tuple[float, ...]], {"lr": [1, 0.5]}, "base")
    {'lr': (1.0, 0.5)}
    >>> restore(Count, -1, "step")
    Traceback (most recent call last):
    ValueError: `step` must be >= 0, got -1.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _restore_in_range(arguments, value, name)
    if origin in (Union, types.UnionType):
        others = [each for each in arguments if each is not types.NoneType]
        assert len(others) == 1, "only unions with None can be restored"
        return None if value is None else restore(others[0], value, name)
    if origin is Literal:
        if not any(type(value) is type(each) and value == each for each in arguments):
            raise _build_error(name, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is tuple:
        return _restore_tuple(arguments, value, name)
    if origin in (dict, Mapping):
        return _restore_mapping(arguments, value, name)
    if hasattr(kind, "restore"):
        return kind.restore(value, name)
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        return _restore_record(kind, value, name)
    return _restore_scalar(kind, value, name)


def _restore_in_range(arguments: tuple[Any, ...], value: Any, name: str) -> Any:
    restored = restore(arguments[0], value, name)
    if not math.isfinite(restored):
        raise _build_error(name, "a finite number", value)
    for limit in (each for each in arguments[1:] if isinstance(each, Range)):
        if limit.at_least is not None and not restored >= limit.at_least:
            raise _build_error(name, f">= {limit.at_least:g}", value)
        if limit.above is not None and not restored > limit.above:
            raise _build_error(name, f"> {limit.above:g}", value)
        if limit.at_most is not None and not restored <= limit.at_most:
            raise _build_error(name, f"<= {limit.at_most:g}", value)
    return restored


def _restore_tuple(arguments: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _build_error(name, "a list", value)
    if arguments == (float, ...) and set(map(type, value)) <= {float}:
        return tuple(value)  # such as a long history of losses
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(value) != len(arguments):
        raise ValueError(f"`{name}` must have length {len(arguments)}, got {len(value)}.")
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(restore(kind, each, f"{name}[{index}]") for index, (kind, each) in pairs)


def _restore_mapping(arguments: tuple[Any, ...], value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _build_error(name, "a mapping", value)
    key_kind, kind = arguments
    return {
        restore(key_kind, key, f"key of {name}"): restore(kind, each, f"{name}[{describe(key)}]")
        for key, each in value.items()
    }


def _restore_record(kind: Any, value: Any, name: str) -> Any:
    """Restore a dataclass or a named tuple, and convert each field to its annotated type."""
    kinds = _read_annotations(kind)
    if isinstance(value, list | tuple) and hasattr(kind, "_fields"):
        return kind(*_restore_tuple(tuple(kinds.values()), value, name))
    if not isinstance(value, Mapping):
        raise _build_error(name, "a mapping", value)
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    optional = {field.name for field in fields if field.metadata.get("optional")}
    for key in kinds:
        if key not in value and key not in optional:
            raise ValueError(f"`{name}` must have the key `{key}`.")
    for key in value:
        if key not in kinds:
            raise ValueError(f"`{name}` has the unknown key {describe(key)}.")
    return kind(**{key: restore(kinds[key], each, f"{name}.{key}") for key, each in value.items()})


@functools.cache
def _read_annotations(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {name: hints[name] for name in kind._fields}


def _restore_scalar(kind: Any, value: Any, name: str) -> Any:
    if kind is Any:
        return value
    if kind is float and type(value) is int and abs(value) <= _MAX_INT:
        return float(value)
    fits = type(value) is kind if kind in _WORDS else isinstance(value, kind)
    if not fits or (kind is int and abs(value) > _MAX_INT):
        raise _build_error(name, _WORDS.get(kind, f"a {kind.__name__}"), value)
    return value


def _build_error(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"`{name}` must be {expected}, got {describe(value)}.")


def describe(value: Any) -> str:
    """Return the repr of a value for an error message, or a shorter text if the repr is long.

    >>> describe("warmup"), describe([1, 2]), describe(10**5000)
    ("'warmup'", '[1, 2]', 'an integer that does not fit in 64 bits')
    """
    return _shortener.repr(value)


class _Shortener(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, value: int, level: int) -> str:
        del level
        # Python refuses to print an integer with more than 4300 digits.
        return repr(value) if abs(value) <= _MAX_INT else "an integer that does not fit in 64 bits"


_shortener = _Shortener()

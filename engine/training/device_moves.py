"""Move the tensors of a batch to a device, including tensors in nested containers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch

__all__ = ["map_leaves", "move_to_device"]


def map_leaves(
    function: Callable[[Any], Any],
    value: Any,
    is_leaf: Callable[[Any], bool] = lambda value: False,
) -> Any:
    """Apply a function to each leaf of nested containers, and return the result.

    Containers are tuples, namedtuples, lists, mappings and dataclasses, at any depth. Every other
    value is a leaf. A container whose values do not change is returned as is. All other containers
    are copied.

    Args:
        function: function that takes a leaf and returns its replacement.
        value: container or leaf.
        is_leaf: function that returns True for each container to treat as a leaf.

    >>> map_leaves(lambda number: -number, {"x": (1, [2])})
    {'x': (-1, [-2])}
    """

    def convert(inner: Any) -> Any:
        return map_leaves(function, inner, is_leaf)

    if is_leaf(value) or isinstance(value, type):
        return function(value)
    if isinstance(value, Mapping):
        return _map_mapping(convert, value)
    if isinstance(value, list | tuple):
        return _map_sequence(convert, value)
    if dataclasses.is_dataclass(value):
        return _map_dataclass(convert, value)
    return function(value)


def _map_mapping(convert: Callable[[Any], Any], value: Mapping[Any, Any]) -> Any:
    items = {key: convert(inner) for key, inner in value.items()}
    if all(items[key] is value[key] for key in items):
        return value
    if not isinstance(value, MutableMapping):
        return type(value)(items)  # type: ignore[call-arg]  # read-only mappings wrap another mapping
    clone: Any = copy.copy(
        value
    )  # the constructor may take other arguments, like that of `defaultdict`
    for key, inner in items.items():  # Hugging Face's ModelOutput has no `update`
        clone[key] = inner
    return clone


def _map_sequence(convert: Callable[[Any], Any], value: list[Any] | tuple[Any, ...]) -> Any:
    items = [convert(inner) for inner in value]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    if isinstance(value, list):
        clone = copy.copy(value)
        clone[:] = items
        return clone
    # A namedtuple takes its fields as separate arguments.
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _map_dataclass(convert: Callable[[Any], Any], value: Any) -> Any:
    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    items = {name: convert(getattr(value, name)) for name in names}
    if all(items[name] is getattr(value, name) for name in names):
        return value
    clone = copy.copy(value)
    for name, inner in items.items():
        object.__setattr__(clone, name, inner)  # works for frozen dataclasses, too
    return clone


def move_to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors moved to a device.

    Copies from pinned memory to a GPU overlap with computation. Copies to the CPU are complete when
    the function returns.

    Args:
        batch: tensor, nested container of tensors as in `map_leaves`, or object with a method
            ``to(device)``, such as Hugging Face's ``BatchEncoding``. Other values stay unchanged.
        device: device to move to.

    >>> move_to_device({"x": [torch.ones(2), "text"]}, torch.device("meta"))
    {'x': [tensor(..., device='meta', size=(2,)), 'text']}
    """

    def move(leaf: Any) -> Any:
        if not _has_to(leaf):
            return leaf
        if device.type != "cpu":
            try:
                return leaf.to(device, non_blocking=True)
            except TypeError:  # the method takes only a device
                pass
        return leaf.to(device)

    return map_leaves(move, batch, is_leaf=_has_to)


def _has_to(value: Any) -> bool:
    return callable(getattr(value, "to", None)) and not isinstance(value, type)

"""Move batches to a device, whatever containers hold their tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["map_leaves", "move_to_device"]


def map_leaves(
    function: Callable[[Any], Any],
    value: Any,
    is_leaf: Callable[[Any], bool] = lambda value: False,
) -> Any:
    """Copy nested containers, with a function applied to each value inside that is no container.

    Containers are tuples, named tuples, lists, mappings and dataclasses, at any depth.

    Args:
        function: function of a leaf, whose result takes the leaf's place.
        value: container or leaf.
        is_leaf: function that returns true for containers that are passed to ``function`` whole.

    >>> map_leaves(lambda number: -number, {"x": (1, [2])})
    {'x': (-1, [-2])}
    """

    def convert(inner: Any) -> Any:
        return map_leaves(function, inner, is_leaf)

    if is_leaf(value):
        return function(value)
    if isinstance(value, Mapping):
        items = {key: convert(inner) for key, inner in value.items()}
        return items if type(value) is dict else _replace_items(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(convert, value))
    if isinstance(value, list | tuple):
        return type(value)(map(convert, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        clone = copy.copy(value)
        for field in dataclasses.fields(value):
            # The dataclass may be frozen.
            object.__setattr__(clone, field.name, convert(getattr(value, field.name)))
        return clone
    return function(value)


def _replace_items(mapping: Any, items: dict[Any, Any]) -> Any:
    """Return a copy of a mapping, of the same class, with other values."""
    if not isinstance(mapping, MutableMapping):
        return type(mapping)(items)
    clone = copy.copy(mapping)
    for key, value in items.items():  # Hugging Face's ModelOutput has no `update`
        clone[key] = value
    return clone


def move_to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device.

    Args:
        batch: tensor, nested container of tensors as in `map_leaves`, or object with a method
            ``to(device)``, such as Hugging Face's ``BatchEncoding``. Anything else is kept.
        device: device to move to.

    >>> move_to_device({"x": [torch.ones(2), "text"]}, torch.device("meta"))
    {'x': [tensor(..., device='meta', size=(2,)), 'text']}
    """

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            # A copy from pinned memory to a GPU then overlaps with computation.
            return leaf.to(device, non_blocking=device.type == "cuda")
        return leaf.to(device) if _has_to(leaf) else leaf

    return map_leaves(move, batch, is_leaf=_has_to)


def _has_to(value: Any) -> bool:
    return callable(getattr(value, "to", None)) and not isinstance(value, type)

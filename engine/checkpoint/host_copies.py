"""Copy the tensors in nested containers to host memory asynchronously."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["copy_to_host", "find_waiting"]


def copy_to_host(value: Any, old: Any = None) -> Any:
    """Return a copy of nested dicts, lists and tuples, with all tensors in host memory.

    GPU tensors are copied asynchronously. Before you read the copies, call the function that
    `find_waiting` returns. Later changes to the GPU tensors on the same stream do not affect the
    copies, because a stream runs its operations in order. The copies of GPU tensors are in pinned
    memory, because a copy to pageable memory would block the host.

    Args:
        value: nested containers of tensors; other values are copied with `copy.deepcopy`.
        old: an earlier result for a value with the same structure. A tensor in ``old`` is
            overwritten and reused if its class, shape and dtype match.

    >>> weights = {"w": torch.ones(2)}
    >>> first = copy_to_host(weights)
    >>> second = copy_to_host(weights, first)
    >>> second["w"] is first["w"], second["w"] is weights["w"]
    (True, False)
    """
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        return {key: copy_to_host(below, before.get(key)) for key, below in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        is_alike = isinstance(old, list | tuple) and len(old) == len(value)
        known = old if is_alike else [None] * len(value)
        copies = [copy_to_host(*pair) for pair in zip(value, known, strict=True)]
        return copies if isinstance(value, list) else tuple(copies)
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    tensor = value.detach()
    is_sharded = isinstance(tensor, DTensor)
    fits = isinstance(old, Tensor) and isinstance(old, DTensor) == is_sharded
    if not fits or old.shape != tensor.shape or old.dtype != tensor.dtype:
        if tensor.layout != torch.strided or tensor.device.type == "cpu":
            return tensor.to("cpu", copy=True)
        old = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return old.copy_(tensor, non_blocking=True)


def find_waiting(value: Any) -> Callable[[], None]:
    """Return a function that waits for the copies that `copy_to_host` started.

    Any thread may call the returned function.

    Args:
        value: the nested containers that were passed to `copy_to_host`.
    """
    devices = {tensor.device for tensor in _find_tensors(value) if tensor.device.type != "cpu"}
    streams = [torch.get_device_module(device).current_stream(device) for device in devices]
    events = [stream.record_event() for stream in streams]

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait


def _find_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _find_tensors(below)

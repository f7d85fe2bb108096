"""Load an optimizer's state in place, and move it to the devices of the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.training.device_moves import move_to_device

__all__ = ["keep_tensors", "move_state"]


@contextlib.contextmanager
def keep_tensors(optimizer: Optimizer) -> Iterator[None]:
    """Make `Optimizer.load_state_dict` update tensors in place inside this context.

    By default, `Optimizer.load_state_dict` replaces the tensors, but a CUDA graph or a compiled
    step continues to use the old tensors. The method also replaces hyperparameters: a tensor can
    become a number, or a number can become a tensor. In this context, tensors are updated in place,
    and numbers stay numbers.

    >>> lr = torch.tensor(0.1)
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr)
    >>> state = optimizer.state_dict()
    >>> state["param_groups"][0]["lr"] = 0.25
    >>> with keep_tensors(optimizer):
    ...     optimizer.load_state_dict(state)
    >>> lr
    tensor(0.2500)
    """
    states = dict(optimizer.state)
    groups = list(optimizer.param_groups)
    yield
    with torch.no_grad():
        for parameter, state in optimizer.state.items():
            if parameter in states:
                optimizer.state[parameter] = _fill(states[parameter], state)
        for before, group in zip(groups, optimizer.param_groups, strict=True):
            for key in group.keys() & before.keys() - {"params"}:
                group[key] = _fill_setting(before[key], group[key])


def _fill(old: Any, new: Any) -> Any:
    """Copy the tensors in ``new`` into their counterparts in ``old``, and return the result.

    The result has the structure of ``new`` and the tensors of ``old``. If a tensor in ``new`` has
    no counterpart of the same shape, dtype and device, the result contains the new tensor.
    """
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        is_alike = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
        if is_alike and type(old) is type(new) and old.layout == new.layout and old is not new:
            return old.copy_(new)
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in new.keys() & old.keys():
            new[key] = _fill(old[key], new[key])
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        new[:] = [_fill(*pair) for pair in zip(old, new, strict=True)]
    return new


def _fill_setting(old: Any, new: Any) -> Any:
    if isinstance(old, tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        return tuple(_fill_setting(*pair) for pair in zip(old, new, strict=True))
    if isinstance(old, Tensor) and isinstance(new, int | float | Tensor):
        # `copy_` would wait for the device if it had to read a number from it.
        return old.copy_(new) if isinstance(new, Tensor) else old.fill_(new)
    if isinstance(old, int | float) and isinstance(new, Tensor) and new.numel() == 1:
        return new.item()
    return new


def move_state(optimizer: Optimizer) -> None:
    """Move an optimizer's state to the devices of its parameters.

    The step counts stay on the host, unless the optimizer is fused or capturable.

    >>> weight = torch.nn.Parameter(torch.ones(1, device="meta"))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> optimizer.state[weight]["momentum_buffer"] = torch.ones(1)
    >>> move_state(optimizer)
    >>> optimizer.state[weight]["momentum_buffer"].device
    device(type='meta')
    """
    for group in optimizer.param_groups:
        counts_on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if key != "step" or counts_on_device:
                    state[key] = move_to_device(value, parameter.device)

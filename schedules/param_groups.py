"""Where an optimizer's param groups keep a hyperparameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

__all__ = ["Slot", "momenta_of", "slots_of"]

Group = dict[str, Any]


class Slot(NamedTuple):
    """The key under which a group keeps a hyperparameter, and how to read and write it there."""

    key: str
    read: Callable[[Group], float]
    write: Callable[[Group, float], None]


def _plain(key: str) -> Slot:
    def write(group: Group, value: float) -> None:
        # A tensor (capturable optimizers, compiled steps) is part of a graph: it has to stay.
        if isinstance(group[key], torch.Tensor):
            group[key].fill_(value)
        else:
            group[key] = value

    return Slot(key, lambda group: float(group[key]), write)


def _write_first_beta(group: Group, value: float) -> None:
    group["betas"] = (value, *group["betas"][1:])


_SLOTS = {
    "lr": (_plain("lr"),),
    "momentum": (
        _plain("momentum"),
        Slot("betas", lambda group: float(group["betas"][0]), _write_first_beta),
    ),
    "weight_decay": (_plain("weight_decay"),),
}

_CURES = {
    "momentum": 'Set `"cycle_momentum": false`, or choose an optimizer that has momentum or betas.'
}


def slots_of(hyperparameter: str, optimizer: Optimizer) -> tuple[Slot, ...]:
    """Return the slot that holds a hyperparameter in each param group.

    Raises:
        ValueError: a group has none.
    """
    slots = []
    for index, group in enumerate(optimizer.param_groups):
        found = [slot for slot in _SLOTS[hyperparameter] if slot.key in group]
        if not found:
            keys = ", ".join(key for key in group if key != "params")
            wanted = " or ".join(f"`{slot.key}`" for slot in _SLOTS[hyperparameter])
            raise ValueError(
                f"param group {index} of {type(optimizer).__name__} must have {wanted}, which the "
                f"schedule drives, but has {keys} instead. {_CURES.get(hyperparameter, '')}".strip()
            )
        slots.append(found[0])
    return tuple(slots)


def momenta_of(optimizer: Optimizer) -> list[float] | list[tuple[float, ...]] | None:
    """Return each group's momentum, or all its betas; None where the optimizer has neither."""
    groups = optimizer.param_groups
    if "momentum" in groups[0]:
        return [float(group["momentum"]) for group in groups]
    return [tuple(group["betas"]) for group in groups] if "betas" in groups[0] else None

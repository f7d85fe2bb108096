"""Read and write the hyperparameters in an optimizer's param groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from schedules.core.per_group import PRECISION

__all__ = [
    "Group",
    "Slot",
    "Slots",
    "find_slots",
    "read_lr",
    "read_momenta",
    "read_momentum",
]

Group = dict[str, Any]
Slots = Mapping[str, Sequence["Slot"]]
"""Mapping from each hyperparameter to its slots, one per param group."""


class Slot:
    """Location of a hyperparameter in a param group.

    Args:
        key: key in the dict of the param group, such as "lr".
    """

    def __init__(self, key: str) -> None:
        self.key = key

    @property
    def label(self) -> str:
        """Name of the hyperparameter in messages."""
        return self.key

    def get(self, group: Group) -> Any:
        """Return the hyperparameter's value (a number or a tensor) in a param group."""
        return group[self.key]

    def put(self, group: Group, value: Any) -> None:
        """Replace the hyperparameter's value in a param group with a number or a tensor."""
        group[self.key] = value

    def read(self, group: Group) -> float:
        """Return the hyperparameter's value in a param group as a float.

        Raises:
            ValueError: the value is not a number.
        """
        value = self.get(group)
        if not isinstance(value, int | float | torch.Tensor):
            raise ValueError(  # noqa: TRY004  # it is a value of the optimizer
                f"`{self.key}` of each param group must be a number, got {value}. Set it in the "
                "optimizer. If the optimizer itself chooses the value, remove the schedule."
            )
        return float(value)

    def write(self, group: Group, value: float) -> None:
        """Write a scheduled value into a param group."""
        current = self.get(group)
        # A CUDA graph or a compiled step can refer to a tensor value, so it is modified in place.
        if isinstance(current, torch.Tensor):
            current.fill_(value)
        else:
            self.put(group, value)

    def holds(self, group: Group, value: float) -> bool:
        """Return whether a param group already holds ``value``, up to rounding."""
        current = self.get(group)
        if isinstance(current, torch.Tensor):
            value = torch.tensor(value, dtype=current.dtype).item()
        return math.isclose(float(current), value, rel_tol=PRECISION)


class _BetaSlot(Slot):
    @property
    def label(self) -> str:
        return f"{self.key}[0]"

    def get(self, group: Group) -> Any:
        return group[self.key][0]

    def put(self, group: Group, value: Any) -> None:
        group[self.key] = (value, *group[self.key][1:])


_SLOTS = {
    "lr": (Slot("lr"),),
    "momentum": (Slot("momentum"), _BetaSlot("betas")),
    "weight_decay": (Slot("weight_decay"),),
}

_FIXES = {
    "momentum": 'Set `"cycle_momentum": false`, or choose an optimizer that has momentum or betas.'
}


def find_slots(hyperparameter: str, optimizer: Optimizer) -> tuple[Slot, ...]:
    """Return the `Slot` of a hyperparameter in each param group.

    Args:
        hyperparameter: "lr", "momentum" or "weight_decay".
        optimizer: optimizer whose param groups are searched. The groups may have different keys.

    Raises:
        ValueError: a group does not have the hyperparameter.
    """
    slots = []
    for index, group in enumerate(optimizer.param_groups):
        found = [slot for slot in _SLOTS[hyperparameter] if slot.key in group]
        if not found:
            keys = ", ".join(key for key in group if key != "params")
            wanted = " or ".join(f"`{slot.key}`" for slot in _SLOTS[hyperparameter])
            fix = _FIXES.get(hyperparameter, "Choose a different optimizer.")
            raise ValueError(
                f"The schedule sets {wanted}, but param group {index} of "
                f"{type(optimizer).__name__} has only the keys {keys}. {fix}"
            )
        slots.append(found[0])
    return tuple(slots)


def read_momenta(optimizer: Optimizer) -> list[float | tuple[float, ...]] | None:
    """Return the momentum or the betas of each group, or None if no group has either.

    If only some groups have momentum or betas, the value for the other groups is 0.
    """
    groups = optimizer.param_groups
    if not any("momentum" in group or "betas" in group for group in groups):
        return None
    return [
        float(group.get("momentum", 0.0))
        if "momentum" in group or "betas" not in group
        else tuple(group["betas"])
        for group in groups
    ]


def read_lr(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def read_momentum(optimizer: Optimizer) -> list[float] | None:
    """Return the momentum or the first beta of each group, or None if no group has either.

    If only some groups have momentum or betas, the value for the other groups is 0.
    """
    momenta = read_momenta(optimizer)
    if momenta is None:
        return None
    return [float(each[0] if isinstance(each, tuple) else each) for each in momenta]

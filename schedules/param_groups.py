"""Where an optimizer's param groups keep a hyperparameter, and how values get there fast.

The binder calls one writer at each step of a run. Where all groups follow one curve the writer
evaluates it once, makes one tuple of betas, and gives both to every group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from schedules.curves import Formula

__all__ = ["Slot", "Writer", "slots_of", "writer"]

Group = dict[str, Any]
Writer = Callable[[int], None]


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


def writer(
    optimizer: Optimizer,
    slots: Mapping[str, Sequence[Slot]],
    formulas: Mapping[str, Sequence[Formula]],
) -> Writer:
    """Return the function that evaluates the formulas at a step and writes them into the groups.

    Args:
        optimizer: its groups are looked up at each step, since loading a state replaces them.
        slots: of each hyperparameter, where each group keeps it.
        formulas: of each hyperparameter, the formula of each group; groups may share one.
    """
    shared = {
        name: of_groups[0] for name, of_groups in formulas.items() if len(set(of_groups)) == 1
    }
    keys = {slot.key for of_groups in slots.values() for slot in of_groups}
    groups = optimizer.param_groups
    tensors = any(isinstance(group[key], torch.Tensor) for group in groups for key in keys)
    other_betas = {tuple(group["betas"][1:]) for group in groups} if "betas" in keys else set()
    if shared.keys() == formulas.keys() and not tensors and len(other_betas) <= 1:
        if keys == {"lr"}:
            return _write_lr(optimizer, shared["lr"])
        if keys == {"lr", "momentum"}:
            return _write_lr_and_momentum(optimizer, shared["lr"], shared["momentum"])
        if keys == {"lr", "betas"}:
            (others,) = other_betas
            return _write_lr_and_betas(optimizer, shared["lr"], shared["momentum"], others)
    return _write_each(optimizer, slots, formulas)


def _write_lr(optimizer: Optimizer, lr_at: Formula) -> Writer:
    def write(step: int) -> None:
        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr

    return write


def _write_lr_and_momentum(optimizer: Optimizer, lr_at: Formula, momentum_at: Formula) -> Writer:
    def write(step: int) -> None:
        lr, momentum = lr_at(step), momentum_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["momentum"] = momentum

    return write


def _write_lr_and_betas(
    optimizer: Optimizer, lr_at: Formula, momentum_at: Formula, others: tuple[float, ...]
) -> Writer:
    def write(step: int) -> None:
        lr, betas = lr_at(step), (momentum_at(step), *others)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["betas"] = betas

    return write


def _write_each(
    optimizer: Optimizer,
    slots: Mapping[str, Sequence[Slot]],
    formulas: Mapping[str, Sequence[Formula]],
) -> Writer:
    columns = [
        (slot.write, index, formula)
        for name, of_groups in formulas.items()
        for index, (slot, formula) in enumerate(zip(slots[name], of_groups, strict=True))
    ]

    def write(step: int) -> None:
        groups = optimizer.param_groups
        for write_slot, index, formula in columns:
            write_slot(groups[index], formula(step))

    return write

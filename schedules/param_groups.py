"""Read hyperparameters from an optimizer's param groups, and write curves into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from schedules.core.controller import Curves
from schedules.core.curves import Formula, Piece

__all__ = ["Group", "Slot", "Stretch", "momenta_of", "slots_of"]

Group = dict[str, Any]


class Slot(NamedTuple):
    """The key of a hyperparameter in a param group, with functions to read and write it."""

    key: str
    read: Callable[[Group], float]
    write: Callable[[Group, float], None]


def _plain(key: str) -> Slot:
    def write(group: Group, value: float) -> None:
        # A tensor (capturable optimizers, compiled steps) is part of a graph: write in place.
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

_FIXES = {
    "momentum": 'Set `"cycle_momentum": false`, or choose an optimizer that has momentum or betas.'
}


def slots_of(hyperparameter: str, optimizer: Optimizer) -> tuple[Slot, ...]:
    """Return the slot of a hyperparameter in each param group.

    Raises:
        ValueError: a group does not have the hyperparameter.
    """
    slots = []
    for index, group in enumerate(optimizer.param_groups):
        found = [slot for slot in _SLOTS[hyperparameter] if slot.key in group]
        if not found:
            keys = ", ".join(key for key in group if key != "params")
            wanted = " or ".join(f"`{slot.key}`" for slot in _SLOTS[hyperparameter])
            raise ValueError(
                f"Param group {index} of {type(optimizer).__name__} must have {wanted}, because "
                f"the schedule sets it, got {keys}. {_FIXES.get(hyperparameter, '')}".strip()
            )
        slots.append(found[0])
    return tuple(slots)


def momenta_of(optimizer: Optimizer) -> list[float] | list[tuple[float, ...]] | None:
    """Return the momentum or the betas of each group; None if the optimizer has neither."""
    groups = optimizer.param_groups
    if "momentum" in groups[0]:
        return [float(group["momentum"]) for group in groups]
    return [tuple(group["betas"]) for group in groups] if "betas" in groups[0] else None


class Stretch:
    """A range of steps in which the formulas of all curves stay the same; writes their values.

    Args:
        groups: param groups of the optimizer.
        slots: name of each hyperparameter to its slot in each group.
        curves: name of each hyperparameter to its curve in each group.
        step: first step to write.
    """

    __slots__ = ("_each", "_lines", "_shared", "end", "last_group", "num_groups")

    def __init__(
        self,
        groups: Sequence[Group],
        slots: Mapping[str, Sequence[Slot]],
        curves: Curves,
        step: int,
    ) -> None:
        found = {curve: curve.piece(step) for of_groups in curves.values() for curve in of_groups}
        self.end = min(piece.end for piece in found.values())
        """Step at which the next piece starts."""
        self.num_groups = len(groups)
        self.last_group = groups[-1]
        """Last param group. It is a different object after groups were added or loaded."""
        pieces = {name: [found[curve] for curve in of_groups] for name, of_groups in curves.items()}
        self._lines = _find_shared_lines(groups, slots, pieces)
        self._shared = _find_shared_formulas(groups, slots, pieces)
        self._each = [
            (group, slot.write, piece.at)
            for name, of_groups in pieces.items()
            for group, (slot, piece) in enumerate(zip(slots[name], of_groups, strict=True))
        ]

    def write(self, groups: Sequence[Group], step: int) -> None:
        """Write the values of a step into the groups."""
        if self._lines:
            origin, steps, rows = self._lines
            progress = (step - origin) / steps
            if len(rows) == 1:
                lr, lr_rise, beta, beta_rise, beta2 = rows[0]
                lr += lr_rise * progress
                betas = (beta + beta_rise * progress, beta2)
                for group in groups:
                    group["lr"] = lr
                    group["betas"] = betas
                return
            for group, row in zip(groups, rows):  # noqa: B905  # `strict` is as slow as a write
                lr, lr_rise, beta, beta_rise, beta2 = row
                group["lr"] = lr + lr_rise * progress
                group["betas"] = (beta + beta_rise * progress, beta2)
        elif self._shared:
            for key, value_at, other_betas in self._shared:
                value = value_at(step)
                if other_betas is not None:
                    value = (value,) + other_betas  # noqa: RUF005  # twice as fast as unpacking
                for group in groups:
                    group[key] = value
        else:
            for index, write, value_at in self._each:
                write(groups[index], value_at(step))


def _find_shared_formulas(
    groups: Sequence[Group],
    slots: Mapping[str, Sequence[Slot]],
    pieces: Mapping[str, Sequence[Piece]],
) -> list[tuple[str, Formula, tuple[float, ...] | None]]:
    """Return key, formula and other betas of each hyperparameter, if all groups share them.

    Each formula is then evaluated once per step, and all groups get the same float or tuple.

    Returns:
        An empty list if the groups differ, or if a hyperparameter is a tensor.
    """
    shared = []
    for name, of_groups in pieces.items():
        keys = {slot.key for slot in slots[name]}
        betas = {tuple(group["betas"][1:]) for group in groups} if keys == {"betas"} else {None}
        if len(set(of_groups)) > 1 or len(keys) > 1 or len(betas) > 1:
            return []
        if any(isinstance(group[key], torch.Tensor) for group in groups for key in keys):
            return []
        shared.append((keys.pop(), of_groups[0].at, betas.pop()))
    return shared


def _find_shared_lines(
    groups: Sequence[Group],
    slots: Mapping[str, Sequence[Slot]],
    pieces: Mapping[str, Sequence[Piece]],
) -> tuple[float, float, list[tuple[float, ...]]] | None:
    """Return the linear formulas of 1Cycle with Adam: origin, steps, and coefficients per group.

    All groups share the fraction ``(step - origin) / steps``, so it is computed once per step. With
    two formulas per group, a step with 256 groups would be as slow as in DeepSpeed.

    Returns:
        None if a curve is not linear, the curves have different origins or lengths, or the
        optimizer is not like Adam. If all groups are equal, there is one row of coefficients.
    """
    keys = {slot.key for of_groups in slots.values() for slot in of_groups}
    if keys != {"lr", "betas"} or len(pieces) != 2:
        return None
    if any(isinstance(group["lr"], torch.Tensor) or len(group["betas"]) != 2 for group in groups):
        return None
    rows: list[tuple[float, ...]] = []
    clocks = set()
    for lr, beta, group in zip(pieces["lr"], pieces["momentum"], groups, strict=True):
        if lr.line is None or beta.line is None:
            return None
        clocks |= {lr.line[2:], beta.line[2:]}
        rows.append((*lr.line[:2], *beta.line[:2], group["betas"][1]))
    if len(clocks) > 1:
        return None
    return (*clocks.pop(), rows[:1] if len(set(rows)) == 1 else rows)

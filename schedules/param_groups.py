"""Read hyperparameters from an optimizer's param groups, and write scheduled values into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from schedules.core.controller import Curves
from schedules.core.pieces import Formula, Piece

__all__ = ["Group", "RangeWriter", "Slot", "find_slots", "read_lr", "read_momenta", "read_momentum"]

Group = dict[str, Any]


class Slot(NamedTuple):
    """Key of a hyperparameter in a param group, and functions that read and write its value."""

    key: str
    read: Callable[[Group], float]
    write: Callable[[Group, float], None]


def _build_slot(key: str) -> Slot:
    def write(group: Group, value: float) -> None:
        # A CUDA graph or a compiled step can refer to a tensor value, so it is modified in place.
        if isinstance(group[key], torch.Tensor):
            group[key].fill_(value)
        else:
            group[key] = value

    return Slot(key, lambda group: float(group[key]), write)


def _write_first_beta(group: Group, value: float) -> None:
    group["betas"] = (value, *group["betas"][1:])


_SLOTS = {
    "lr": (_build_slot("lr"),),
    "momentum": (
        _build_slot("momentum"),
        Slot("betas", lambda group: float(group["betas"][0]), _write_first_beta),
    ),
    "weight_decay": (_build_slot("weight_decay"),),
}

_FIXES = {
    "momentum": 'Set `"cycle_momentum": false`, or choose an optimizer that has momentum or betas.'
}


def find_slots(hyperparameter: str, optimizer: Optimizer) -> tuple[Slot, ...]:
    """Return the `Slot` in which each param group stores a hyperparameter.

    Args:
        hyperparameter: "lr", "momentum" or "weight_decay".
        optimizer: optimizer whose param groups are searched.

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


def read_momenta(optimizer: Optimizer) -> list[float] | list[tuple[float, ...]] | None:
    """Return the momentum or the betas of each group, or None if the optimizer has neither."""
    groups = optimizer.param_groups
    if "momentum" in groups[0]:
        return [float(group["momentum"]) for group in groups]
    return [tuple(group["betas"]) for group in groups] if "betas" in groups[0] else None


def read_lr(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def read_momentum(optimizer: Optimizer) -> list[float] | None:
    """Return the momentum or the first beta of each group; None if the optimizer has neither."""
    momenta = read_momenta(optimizer)
    if momenta is None:
        return None
    return [float(each if isinstance(each, float) else each[0]) for each in momenta]


class RangeWriter:
    """Writes scheduled values into param groups, for steps in which no curve changes its formula.

    The constructor prepares the formulas, so that `write` is fast.

    Args:
        groups: param groups of the optimizer.
        slots: dict that maps each hyperparameter to its slot in each group.
        curves: dict that maps each hyperparameter to its curve in each group.
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
        found = {curve: curve.piece(step) for in_groups in curves.values() for curve in in_groups}
        self.end = min(piece.end for piece in found.values())
        """End of the range (exclusive), where the formula of a curve changes."""
        self.num_groups = len(groups)
        self.last_group = groups[-1]
        """Last param group, used to detect that groups were added or replaced."""
        pieces = {name: [found[curve] for curve in in_groups] for name, in_groups in curves.items()}
        self._lines = _find_shared_lines(groups, slots, pieces)
        self._shared = _find_shared_formulas(groups, slots, pieces)
        self._each = [
            (group, slot.write, piece.formula)
            for name, in_groups in pieces.items()
            for group, (slot, piece) in enumerate(zip(slots[name], in_groups, strict=True))
        ]

    def write(self, groups: Sequence[Group], step: int) -> None:
        """Write the scheduled values at a step into the param groups."""
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
            for group, row in zip(groups, rows):  # noqa: B905  # `strict` takes as long as a write
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
    """Return the formula of each hyperparameter, if it is the same in all param groups.

    Each formula then has to be evaluated only once per step.

    Returns:
        One tuple per hyperparameter: its key in the param groups, its formula, and the betas after
        the first one (None if the key is not ``betas``). The list is empty if the groups differ or
        a hyperparameter is a tensor.
    """
    shared = []
    for name, in_groups in pieces.items():
        keys = {slot.key for slot in slots[name]}
        betas = {tuple(group["betas"][1:]) for group in groups} if keys == {"betas"} else {None}
        if len(set(in_groups)) > 1 or len(keys) > 1 or len(betas) > 1:
            return []
        if any(isinstance(group[key], torch.Tensor) for group in groups for key in keys):
            return []
        shared.append((keys.pop(), in_groups[0].formula, betas.pop()))
    return shared


def _find_shared_lines(
    groups: Sequence[Group],
    slots: Mapping[str, Sequence[Slot]],
    pieces: Mapping[str, Sequence[Piece]],
) -> tuple[float, float, list[tuple[float, ...]]] | None:
    """Return the coefficients of all curves, if all curves are linear in the same range of steps.

    An example is 1Cycle with Adam. ``(step - origin) / steps`` is then computed once per step for
    all groups, which is faster than evaluating two formulas per group.

    Returns:
        The origin, the number of steps, and one row per group. A row has the initial learning rate,
        its total change, the initial beta1, its total change, and beta2. If all rows are equal,
        only one row is returned. The result is None if a curve is not linear, the curves have
        different origins or lengths, a learning rate is a tensor, or the schedule does not set
        exactly ``lr`` and ``betas``.
    """
    keys = {slot.key for in_groups in slots.values() for slot in in_groups}
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

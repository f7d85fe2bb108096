"""Read hyperparameters from an optimizer's param groups, and write scheduled values into them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from schedules.core.controller import Curves, Values
from schedules.core.per_group import PRECISION
from schedules.core.pieces import Formula

__all__ = [
    "Group",
    "RangeWriter",
    "Slot",
    "find_slots",
    "read_lr",
    "read_momenta",
    "read_momentum",
    "write_values",
]

Group = dict[str, Any]
Slots = Mapping[str, Sequence["Slot"]]
"""Mapping from each hyperparameter to its slots, one per param group."""

_Lines = tuple[float, float, list[tuple[float, float, float, float]]]


class Slot:
    """Location of a hyperparameter in a param group.

    Args:
        key: key in the dict of the param group, such as "lr".
    """

    def __init__(self, key: str) -> None:
        self.key = key

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


def write_values(groups: Sequence[Group], slots: Slots, values: Values) -> None:
    """Write the values of each hyperparameter into the param groups."""
    for name, in_groups in values.items():
        _separate_tensors(groups, slots[name], in_groups)
        for slot, group, value in zip(slots[name], groups, in_groups, strict=True):
            slot.write(group, value)


def _separate_tensors(
    groups: Sequence[Group], slots: Sequence[Slot], values: Sequence[object]
) -> None:
    """Clone tensors that several param groups share, if the groups need different values."""
    first: dict[int, object] = {}
    for group, slot, value in zip(groups, slots, values, strict=True):
        current = slot.get(group)
        if isinstance(current, torch.Tensor) and first.setdefault(id(current), value) != value:
            slot.put(group, current.clone())


class RangeWriter:
    """Writer of scheduled values for a range of steps in which each curve has a single formula.

    The constructor writes the values of the first step, and prepares the formulas so that `write`
    is fast.

    Args:
        groups: param groups of the optimizer.
        slots: dict that maps each hyperparameter to its slots, one per group.
        curves: dict that maps each hyperparameter to its curves, one per group.
        step: first step to write.
    """

    __slots__ = (
        "_betas",
        "_line",
        "_lines",
        "_pieces",
        "_shared",
        "_slots",
        "end",
        "last_group",
        "num_groups",
        "start",
        "step",
    )

    def __init__(self, groups: Sequence[Group], slots: Slots, curves: Curves, step: int) -> None:
        found = {curve: curve.piece(step) for in_groups in curves.values() for curve in in_groups}
        self.start = step
        """First step of the range. Earlier steps may have a different formula."""
        self.end = min(piece.end for piece in found.values())
        """End of the range (exclusive): the first step at which a curve's formula changes."""
        self.step = step
        """Step whose values were written most recently."""
        self.num_groups = len(groups)
        self.last_group = groups[-1]
        """The final param group; used with ``num_groups`` to detect added or replaced groups."""
        self._slots = slots
        self._pieces = {
            name: [found[curve] for curve in in_groups] for name, in_groups in curves.items()
        }
        for name, in_groups in curves.items():
            _separate_tensors(groups, slots[name], in_groups)
        self._write_each(groups, step)
        is_plain = all(
            not isinstance(slot.get(group), torch.Tensor)
            for name in curves
            for slot, group in zip(slots[name], groups, strict=True)
        )
        self._betas = self._share_betas(groups) if is_plain else None
        self._line: tuple[float, ...] | None = None
        self._lines = self._find_lines(groups) if is_plain else None
        if self._lines and self._betas and len(set(self._lines[2])) == 1:
            self._line = (*self._lines[:2], *self._lines[2][0], self._betas[1])
        self._shared = self._find_shared_formulas() if is_plain else []

    def values(self) -> Values:
        """Return the most recently written values of each hyperparameter."""
        return {
            name: tuple(piece.formula(self.step) for piece in pieces)
            for name, pieces in self._pieces.items()
        }

    def write(self, groups: Sequence[Group], step: int) -> bool:
        """Write the scheduled values at a step into the param groups.

        Returns:
            Whether all values were written. If false, other code has changed the betas of a param
            group, and the caller must create a new writer.
        """
        old = self._betas
        if self._line:
            origin, steps, lr, lr_rise, beta, beta_rise, beta2 = self._line
            progress = (step - origin) / steps
            lr += lr_rise * progress
            self._betas = betas = (beta + beta_rise * progress, beta2)
            for group in groups:
                if group["betas"] is not old:
                    return False
                group["lr"] = lr
                group["betas"] = betas
        elif self._lines:
            origin, steps, rows = self._lines
            progress = (step - origin) / steps
            if old is not None:
                beta, beta_rise = rows[0][2:]
                self._betas = betas = (beta + beta_rise * progress, old[1])
                for group, (lr, lr_rise, _, _) in zip(groups, rows):  # noqa: B905  # slower
                    if group["betas"] is not old:
                        return False
                    group["lr"] = lr + lr_rise * progress
                    group["betas"] = betas
            else:
                for group, (lr, lr_rise, beta, beta_rise) in zip(groups, rows):  # noqa: B905
                    group["lr"] = lr + lr_rise * progress
                    group["betas"] = (beta + beta_rise * progress, group["betas"][1])
        elif self._shared:
            rest = old[1:] if old else ()
            for key, value_at in self._shared:
                value = value_at(step)
                if key == "betas":
                    self._betas = betas = (value,) + rest  # noqa: RUF005  # unpacking is slower
                    for group in groups:
                        if group["betas"] is not old:
                            return False
                        group["betas"] = betas
                else:
                    for group in groups:
                        group[key] = value
        else:
            self._write_each(groups, step)
        self.step = step
        return True

    def _write_each(self, groups: Sequence[Group], step: int) -> None:
        for name, pieces in self._pieces.items():
            for group, slot, piece in zip(groups, self._slots[name], pieces, strict=True):
                slot.write(group, piece.formula(step))

    def _share_betas(self, groups: Sequence[Group]) -> tuple[float, ...] | None:
        """Let all param groups share one tuple of betas, if their betas are equal at every step.

        `write` then needs only one identity check per group to detect that other code has changed
        the betas.

        Returns:
            The shared tuple, or None if the betas differ or the schedule does not set them.
        """
        keys = {slot.key for slot in self._slots.get("momentum", ())}
        if keys != {"betas"} or len(set(self._pieces["momentum"])) > 1:
            return None
        betas: tuple[float, ...] = groups[0]["betas"]
        if any(group["betas"] != betas for group in groups):
            return None
        for group in groups:
            group["betas"] = betas
        return betas

    def _find_shared_formulas(self) -> list[tuple[str, Formula]]:
        """Return the (key, formula) pairs of the hyperparameters if all param groups share them.

        `write` evaluates each of these formulas only once per step. If any key or formula differs
        between groups, return an empty list.
        """
        shared = []
        for name, pieces in self._pieces.items():
            keys = {slot.key for slot in self._slots[name]}
            if len(set(pieces)) > 1 or len(keys) > 1 or (keys == {"betas"} and not self._betas):
                return []
            shared.append((keys.pop(), pieces[0].formula))
        return shared

    def _find_lines(self, groups: Sequence[Group]) -> _Lines | None:
        """Return the coefficients of all curves, if all are linear over the same range of steps.

        This is the case for 1Cycle with Adam, for example. `write` then computes
        ``(step - origin) / steps`` only once for all groups.

        Returns:
            ``(origin, steps, rows)``: the step at which the lines start, their number of steps, and
            a row ``(initial lr, change of lr, initial beta1, change of beta1)`` for each group.
            None if a curve is not linear, if the curves differ in ``origin`` or ``steps``, or if
            the scheduled hyperparameters are not exactly ``lr`` and the first of two betas.
        """
        keys = {slot.key for slots in self._slots.values() for slot in slots}
        if keys != {"lr", "betas"} or self._pieces.keys() != {"lr", "momentum"}:
            return None
        if any(len(group["betas"]) != 2 for group in groups):
            return None
        lines = {name: [p.line for p in pieces if p.line] for name, pieces in self._pieces.items()}
        lrs, betas = lines["lr"], lines["momentum"]
        clocks = {line[2:] for line in (*lrs, *betas)}
        if len(clocks) > 1 or not len(lrs) == len(betas) == len(groups):
            return None
        rows = [(*lr[:2], *beta[:2]) for lr, beta in zip(lrs, betas, strict=True)]
        return (*clocks.pop(), rows)

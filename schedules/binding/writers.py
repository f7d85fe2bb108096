"""Write scheduled values into param groups, and find the values that other code has changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from schedules.core.controller import Curves, Values
from schedules.core.pieces import Formula
from schedules.param_groups import Group, Slot, Slots

__all__ = ["Change", "RangeWriter", "ValueWriter", "Writer"]

_Lines = tuple[float, float, list[tuple[float, float, float, float]]]


def _separate_tensors(
    groups: Sequence[Group], slots: Sequence[Slot], values: Sequence[object]
) -> None:
    """Clone tensors that several param groups share, if the groups need different values."""
    first: dict[int, object] = {}
    for group, slot, value in zip(groups, slots, values, strict=True):
        current = slot.get(group)
        if isinstance(current, torch.Tensor) and first.setdefault(id(current), value) != value:
            slot.put(group, current.clone())


class Change(NamedTuple):
    """A hyperparameter of a param group that other code has changed."""

    slot: Slot
    group_index: int
    value: float
    """Value that other code set."""


class Writer(ABC):
    """Base class of writers. A writer remembers its values, to find changes by other code.

    Args:
        slots: dict that maps each hyperparameter to its slots, one per group.
    """

    __slots__ = ("_slots", "_tensors", "_unwritten", "_versions")

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._tensors: list[torch.Tensor] = []
        self._versions: list[int] = []
        """How often each of the tensors had been modified in place after the latest write."""
        self._unwritten = dict.fromkeys(slots, 0)
        """Index of the first group that still has the values of the latest complete write."""

    @abstractmethod
    def values(self) -> Values:
        """Return the most recently written values of each hyperparameter."""

    def find_change(self, groups: Sequence[Group]) -> Change | None:
        """Return the first hyperparameter that other code has changed since the latest write.

        Values that are equal up to rounding are not a change.
        """
        # Reading a tensor can wait for the GPU, so compare its version counter first.
        pairs = zip(self._tensors, self._read_versions(), self._versions, strict=True)
        unchanged = {id(tensor) for tensor, now, before in pairs if now == before}
        for name, values in self.values().items():
            slots = self._slots[name]
            for index in range(self._unwritten[name], min(len(values), len(groups))):
                slot, group = slots[index], groups[index]
                if unchanged and id(slot.get(group)) in unchanged:
                    continue
                if not slot.holds(group, values[index]):
                    return Change(slot, index, slot.read(group))
        return None

    def _find_tensors(self, groups: Sequence[Group]) -> bool:
        """Find the tensors among the written values; return whether there are any."""
        written = [
            value
            for slots in self._slots.values()
            for slot, group in zip(slots, groups, strict=True)
            if isinstance(value := slot.get(group), torch.Tensor)
        ]
        # Inference tensors have no version counter.
        self._tensors = [tensor for tensor in written if not tensor.is_inference()]
        self._versions = self._read_versions()
        return bool(written)

    def _read_versions(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]  # noqa: SLF001  # no public name


class ValueWriter(Writer):
    """Writer of one value of each hyperparameter per group, which the constructor writes.

    Args:
        groups: param groups of the optimizer.
        slots: dict that maps each hyperparameter to its slots, one per group.
        values: dict that maps each hyperparameter to its values, one per group.
    """

    __slots__ = ("_values",)

    def __init__(self, groups: Sequence[Group], slots: Slots, values: Values) -> None:
        super().__init__(slots)
        self._values = values
        for name, in_groups in values.items():
            _separate_tensors(groups, slots[name], in_groups)
            for slot, group, value in zip(slots[name], groups, in_groups, strict=True):
                slot.write(group, value)
        self._find_tensors(groups)

    def values(self) -> Values:  # noqa: D102  # documented in the base class
        return self._values


class RangeWriter(Writer):
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
        "_latest",
        "_latest_lr",
        "_line",
        "_lines",
        "_pieces",
        "_shared",
        "end",
        "last_group",
        "num_groups",
        "start",
        "step",
    )

    def __init__(self, groups: Sequence[Group], slots: Slots, curves: Curves, step: int) -> None:
        super().__init__(slots)
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
        self._pieces = {
            name: [found[curve] for curve in in_groups] for name, in_groups in curves.items()
        }
        for name, in_groups in curves.items():
            _separate_tensors(groups, slots[name], in_groups)
        for name, pieces in self._pieces.items():
            for group, slot, piece in zip(groups, slots[name], pieces, strict=True):
                slot.write(group, piece.formula(step))
        is_plain = not self._find_tensors(groups)
        self._betas = self._share_betas(groups) if is_plain else None
        self._line: tuple[float, ...] | None = None
        self._lines = self._find_lines(groups) if is_plain else None
        if self._lines and self._betas and len(set(self._lines[2])) == 1:
            self._line = (*self._lines[:2], *self._lines[2][0], self._betas[1])
        self._shared = self._find_shared_formulas() if is_plain else []
        self._latest: dict[str, list[Any]] = {
            name: [slot.get(group) for slot, group in zip(slots[name], groups, strict=True)]
            for name in self._pieces
        }
        """Latest values or tensors by hyperparameter, one per group. If all groups share a formula,
        `write` updates only the first of them."""
        self._latest_lr = self._latest["lr"][0] if self._line else None

    def values(self) -> Values:  # noqa: D102  # documented in the base class
        return {
            name: tuple(piece.formula(self.step) for piece in pieces)
            for name, pieces in self._pieces.items()
        }

    def write(self, groups: Sequence[Group], step: int) -> bool:
        """Write the scheduled values at a step into the param groups.

        Returns:
            Whether all values were written. If false, other code has changed a value, and the
            caller must create a new writer. `find_change` then returns the change.
        """
        old = self._betas
        if self._line:
            origin, steps, lr, lr_rise, beta, beta_rise, beta2 = self._line
            progress = (step - origin) / steps
            latest, lr = self._latest_lr, lr + lr_rise * progress
            self._betas = betas = (beta + beta_rise * progress, beta2)
            for group in groups:
                if group["lr"] != latest or group["betas"] is not old:
                    return self._reject(groups, group)
                group["lr"] = lr
                group["betas"] = betas
            self._latest_lr = lr
        elif self._lines:
            origin, steps, rows = self._lines
            progress, before = (step - origin) / steps, (self.step - origin) / steps
            if old is not None:
                beta, beta_rise = rows[0][2:]
                self._betas = betas = (beta + beta_rise * progress, old[1])
                for group, (lr, lr_rise, _, _) in zip(groups, rows):  # noqa: B905  # slower
                    if group["lr"] != lr + lr_rise * before or group["betas"] is not old:
                        return self._reject(groups, group)
                    group["lr"] = lr + lr_rise * progress
                    group["betas"] = betas
            else:
                for group, (lr, lr_rise, beta, beta_rise) in zip(groups, rows):  # noqa: B905
                    now, beta2 = group["betas"]
                    if group["lr"] != lr + lr_rise * before or now != beta + beta_rise * before:
                        return self._reject(groups, group)
                    group["lr"] = lr + lr_rise * progress
                    group["betas"] = (beta + beta_rise * progress, beta2)
        elif self._shared:
            for name, key, value_at in self._shared:
                value, latest = value_at(step), self._latest[name]
                if key == "betas":
                    assert old is not None
                    self._betas = betas = (value,) + old[1:]  # noqa: RUF005  # unpacking is slower
                    for group in groups:
                        if group["betas"] is not old:
                            return self._reject(groups, group, name)
                        group["betas"] = betas
                else:
                    for group in groups:
                        if group[key] != latest[0]:
                            return self._reject(groups, group, name)
                        group[key] = value
                    latest[0] = value
        elif not self._write_each(groups, step):
            return False
        self.step = step
        return True

    def _reject(self, groups: Sequence[Group], changed: Group, name: str | None = None) -> bool:
        """Record that a write ended before ``changed``, a group with an unexpected value.

        Args:
            groups: param groups of the optimizer.
            changed: group in which the write ended.
            name: hyperparameter that was being written, if the hyperparameters are written one
                after the other.

        Returns:
            False, the result of a write that was not completed.
        """
        first = next(index for index, group in enumerate(groups) if group is changed)
        self._unwritten = dict.fromkeys(self._pieces, first if name is None else 0)
        for each in self._pieces if name is not None else ():
            self._unwritten[each] = first if each == name else len(groups)
            if each == name:
                break
        return False

    def _write_each(self, groups: Sequence[Group], step: int) -> bool:
        if self._tensors and self._read_versions() != self._versions:
            return self._reject(groups, groups[0])
        for name, pieces in self._pieces.items():
            latest = self._latest[name]
            rows = enumerate(zip(groups, self._slots[name], pieces, strict=True))
            for index, (group, slot, piece) in rows:
                current = slot.get(group)
                if current is not latest[index]:
                    return self._reject(groups, group, name)
                value = piece.formula(step)
                if isinstance(current, torch.Tensor):
                    current.fill_(value)
                else:
                    slot.put(group, value)
                    latest[index] = value
        if self._tensors:
            self._versions = self._read_versions()
        return True

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

    def _find_shared_formulas(self) -> list[tuple[str, str, Formula]]:
        """Return the name, key and formula of each hyperparameter if all param groups share them.

        `write` evaluates each of these formulas only once per step. If any key or formula differs
        between groups, return an empty list.
        """
        shared = []
        for name, pieces in self._pieces.items():
            keys = {slot.key for slot in self._slots[name]}
            if len(set(pieces)) > 1 or len(keys) > 1 or (keys == {"betas"} and not self._betas):
                return []
            shared.append((name, keys.pop(), pieces[0].formula))
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

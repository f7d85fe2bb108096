"""How the values of a step get into the param groups fast: one flat function for each situation.

The binder calls one writer at each step of a run. Nearly always all groups follow one curve: then
it is evaluated once, one tuple of betas is made, and every group gets both. Where learning rate and
momentum are straight and share their clock, as in 1Cycle, so is the one quotient in them. All else
is written slot by slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch.optim import Optimizer

from schedules.curves import Formula, Line, Piece
from schedules.param_groups import Slot

__all__ = ["Writer", "flat_step", "writer"]

Writer = Callable[[int], None]


def writer(
    optimizer: Optimizer,
    slots: Mapping[str, Sequence[Slot]],
    pieces: Mapping[str, Sequence[Piece]],
) -> Writer:
    """Return the function that evaluates pieces of curves at a step and writes into the groups.

    Args:
        optimizer: its groups are looked up at each step, since loading a state replaces them.
        slots: of each hyperparameter, where each group keeps it.
        pieces: of each hyperparameter, the piece that each group is on; groups may share one.
    """
    keys = {slot.key for of_groups in slots.values() for slot in of_groups}
    groups = optimizer.param_groups
    if any(isinstance(group[key], torch.Tensor) for group in groups for key in keys):
        return _write_each(optimizer, slots, pieces)
    shared = all(len(set(of_groups)) == 1 for of_groups in pieces.values())
    if keys == {"lr"} and shared:
        return _lr(optimizer, pieces["lr"][0].at)
    if keys not in ({"lr", "betas"}, {"lr", "momentum"}) or len(pieces) != len(keys):
        return _write_each(optimizer, slots, pieces)
    others = [group["betas"][1:] for group in groups] if "betas" in keys else []
    lines = [piece.line for of_groups in pieces.values() for piece in of_groups]
    straight = None not in lines and len({line[2:] for line in lines if line}) == 1
    if shared and len(set(others)) <= 1:
        lr, momentum = pieces["lr"][0], pieces["momentum"][0]
        if straight and not others:
            return _line(optimizer, cast("Line", lr.line), cast("Line", momentum.line))
        if others:
            return _lr_and_betas(optimizer, lr.at, momentum.at, others[0])
        return _lr_and_momentum(optimizer, lr.at, momentum.at)
    if straight and len({len(rest) for rest in others}) == 1 and len(others[0]) == 1:
        return _lines_betas(optimizer, cast("list[Line]", lines), [rest[0] for rest in others])
    return _write_each(optimizer, slots, pieces)


class Clock(Protocol):
    """What counts updates: a binder, with the long way that always works."""

    last_epoch: int

    def long_step(self, epoch: int | None = None) -> None:
        """Count an update and write what the next one uses, in any situation."""
        ...

    def enter(self, count: int) -> None:
        """Look again at the groups and the curves as they are at this count."""
        ...


def flat_step(
    clock: Clock,
    until: float,
    optimizer: Optimizer,
    slots: Mapping[str, Sequence[Slot]],
    pieces: Mapping[str, Sequence[Piece]],
) -> Callable[[int | None], None] | None:
    """Return the whole of ``clock.step`` as one function, for a straight stretch of 1Cycle on Adam.

    That is the case of most updates of most runs, and a call inside a call is a quarter of what a
    step costs there. All that is not this case, and the stretch's end, goes the long way.

    Returns:
        None where the stretch is another one.
    """
    keys = {slot.key for of_groups in slots.values() for slot in of_groups}
    groups = optimizer.param_groups
    beta2s = {group["betas"][1:] for group in groups if "betas" in group}
    shared = all(len(set(of_groups)) == 1 for of_groups in pieces.values())
    if keys != {"lr", "betas"} or not shared or len(beta2s) != 1 or len(pieces) != 2:
        return None
    (others,) = beta2s
    lr_line, momentum_line = pieces["lr"][0].line, pieces["momentum"][0].line
    if lr_line is None or momentum_line is None or lr_line[2:] != momentum_line[2:]:
        return None
    if len(others) != 1 or any(isinstance(group["lr"], torch.Tensor) for group in groups):
        return None
    (beta2,) = others
    lr_begin, lr_rise, origin, steps = lr_line
    momentum_begin, momentum_rise, *_ = momentum_line
    begin, last_group = clock.last_epoch, groups[-1]
    long_way = clock.long_step

    def step(epoch: int | None = None) -> None:
        count = clock.last_epoch + 1
        # Before its begin it is only called when somebody kept it and loaded an earlier state.
        if not begin < count < until or epoch is not None:
            long_way(epoch)
            return
        clock.last_epoch = count
        progress = (count - origin) / steps
        lr = lr_begin + lr_rise * progress
        betas = (momentum_begin + momentum_rise * progress, beta2)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["betas"] = betas
        # The loop's last group is another one when a group was added or a state was loaded.
        if group is not last_group:
            clock.enter(count)

    return step


def _lr(optimizer: Optimizer, lr_at: Formula) -> Writer:
    def write(step: int) -> None:
        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr

    return write


def _lr_and_momentum(optimizer: Optimizer, lr_at: Formula, momentum_at: Formula) -> Writer:
    def write(step: int) -> None:
        lr, momentum = lr_at(step), momentum_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["momentum"] = momentum

    return write


def _lr_and_betas(
    optimizer: Optimizer, lr_at: Formula, momentum_at: Formula, others: tuple[float, ...]
) -> Writer:
    def write(step: int) -> None:
        lr, betas = lr_at(step), (momentum_at(step), *others)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["betas"] = betas

    return write


def _line(optimizer: Optimizer, lr_line: Line, momentum_line: Line) -> Writer:
    lr_begin, lr_rise, origin, steps = lr_line
    momentum_begin, momentum_rise, *_ = momentum_line

    def write(step: int) -> None:
        progress = (step - origin) / steps
        lr = lr_begin + lr_rise * progress
        momentum = momentum_begin + momentum_rise * progress
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["momentum"] = momentum

    return write


def _lines_betas(optimizer: Optimizer, lines: Sequence[Line], beta2s: Sequence[float]) -> Writer:
    """Write groups that have each a line of their own; the lines of momentum follow the others."""
    count = len(beta2s)
    origin, steps = lines[0][2:]
    rows = [
        (*lr[:2], *momentum[:2], beta2)
        for lr, momentum, beta2 in zip(lines[:count], lines[count:], beta2s, strict=True)
    ]

    def write(step: int) -> None:
        progress = (step - origin) / steps
        for group, row in zip(optimizer.param_groups, rows):  # noqa: B905  # it costs as much as a write
            lr_begin, lr_rise, momentum_begin, momentum_rise, beta2 = row
            group["lr"] = lr_begin + lr_rise * progress
            group["betas"] = (momentum_begin + momentum_rise * progress, beta2)

    return write


def _write_each(
    optimizer: Optimizer,
    slots: Mapping[str, Sequence[Slot]],
    pieces: Mapping[str, Sequence[Piece]],
) -> Writer:
    columns = [
        (slot.write, index, piece.at)
        for name, of_groups in pieces.items()
        for index, (slot, piece) in enumerate(zip(slots[name], of_groups, strict=True))
    ]

    def write(step: int) -> None:
        groups = optimizer.param_groups
        for write_slot, index, value_at in columns:
            write_slot(groups[index], value_at(step))

    return write

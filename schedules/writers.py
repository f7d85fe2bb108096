"""How the values of a step get into the param groups fast: one flat function for each situation.

The binder calls one writer at each step of a run. Nearly always all groups follow one curve: then
it is evaluated once, one tuple of betas is made, and every group gets both. Where learning rate and
momentum are straight and share their clock, as in 1Cycle, so is the one quotient in them. All else
is written slot by slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch.optim import Optimizer

from schedules.core.curves import Formula, Line, Piece
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


class FlatStep(NamedTuple):
    """The whole of ``clock.step`` as one function, for a straight stretch of 1Cycle on Adam."""

    step: Callable[[int | None], None]
    expire: Callable[[], None]
    """Sends a ``step`` that somebody kept the long way, once the stretch is another one."""


def flat_step(
    clock: Clock,
    until: float,
    optimizer: Optimizer,
    slots: Mapping[str, Sequence[Slot]],
    pieces: Mapping[str, Sequence[Piece]],
) -> FlatStep | None:
    """Return the one function that does what ``clock.step`` does until the stretch ends.

    It is there for straight lines on Adam, the case of most updates of most runs: a call inside a
    call is a quarter of what a step costs there. All that is not this case goes the long way.

    Returns:
        None where the stretch is another one.
    """
    groups = optimizer.param_groups
    keys = {slot.key for of_groups in slots.values() for slot in of_groups}
    lines = {name: [piece.line for piece in of_groups] for name, of_groups in pieces.items()}
    clocks = {line[2:] if line else None for of_groups in lines.values() for line in of_groups}
    if keys != {"lr", "betas"} or len(lines) != 2 or len(clocks) != 1 or None in clocks:
        return None
    if any(isinstance(group["lr"], torch.Tensor) or len(group["betas"]) != 2 for group in groups):
        return None
    rows = [
        (lr[0], lr[1], momentum[0], momentum[1], group["betas"][1])
        for lr, momentum, group in zip(lines["lr"], lines["momentum"], groups, strict=True)
        if lr and momentum
    ]
    ((origin, steps),) = cast("set[tuple[float, float]]", clocks)
    lr_begin, lr_rise, momentum_begin, momentum_rise, beta2 = rows[0]
    last_group = groups[-1]
    long_way = clock.long_step

    def step_alike(epoch: int | None = None) -> None:
        count = clock.last_epoch + 1
        if count >= until or epoch is not None:
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

    def step_each(epoch: int | None = None) -> None:
        count = clock.last_epoch + 1
        if count >= until or epoch is not None or optimizer.param_groups[-1] is not last_group:
            long_way(epoch)
            return
        clock.last_epoch = count
        progress = (count - origin) / steps
        for group, row in zip(optimizer.param_groups, rows):  # noqa: B905  # it costs as much as a write
            lr_begin, lr_rise, momentum_begin, momentum_rise, beta2 = row
            group["lr"] = lr_begin + lr_rise * progress
            group["betas"] = (momentum_begin + momentum_rise * progress, beta2)

    def expire() -> None:
        nonlocal until
        until = -1

    return FlatStep(step_alike if len(set(rows)) == 1 else step_each, expire)


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

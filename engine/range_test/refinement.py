"""Short cycles around a suggestion: which maximum is best is tried, not read from a curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.range_test.recorder import Run

__all__ = ["Refinement", "refine", "refuse_updates", "short_cycle"]

_FACTOR = 2.0  # between neighbouring maxima
_REACH = 2  # maxima to each side of the lowest that a parabola is laid through
_FARTHEST = 6  # factors from where the search began
_HORIZON = 0.32  # see Refinement.max_lr
_MOMENTUM = ("cycle_momentum", "cycle_min_mom", "cycle_max_mom")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Refinement:
    """What short cycles to several maxima came to.

    >>> tried = {0.01 * 2**k: (1 + (k - 0.5) ** 2 / 10,) for k in range(-2, 3)}
    >>> round(Refinement(tried, begin=3.0, steps=250).lowest, 4)  # between 0.01 and 0.02
    0.0141
    >>> Refinement(tried, begin=3.0, steps=250, updates=2500).max_lr  # ten times as long
    0.0068
    """

    losses: Mapping[float, tuple[float, ...]]
    """For each maximum the loss that each repeat ended at; infinite where it diverged."""
    begin: float
    """The loss before training."""
    steps: int
    """Updates of each cycle."""
    updates: int | None = None
    """Updates of the training that is to follow."""

    @cached_property
    def lowest(self) -> float:
        """The maximum with which a cycle of `steps` updates would end lowest."""
        return self._lowest_of(np.array(list(self.losses.values())).mean(axis=1))

    @property
    def of_each(self) -> list[float]:
        """The same by each repeat alone: their spread."""
        return [self._lowest_of(column) for column in np.array(list(self.losses.values())).T]

    @property
    def shrinkage(self) -> float:
        """What a longer training leaves of a maximum: ``(steps / updates) ** 0.32``, at most 1."""
        return 1.0 if self.updates is None else min(1.0, (self.steps / self.updates) ** _HORIZON)

    @property
    def max_lr(self) -> float:
        """The largest learning rate to train with, to two digits: ``lowest * shrinkage``.

        The longer a training, the lower its best learning rate, by a power of its length.

        Source of the power: Bjorck et al., Scaling Optimal LR Across Token Horizons,
        https://arxiv.org/abs/2409.19913.
        """
        return float(f"{self.lowest * self.shrinkage:.2g}")

    def rows(self) -> list[tuple[str, str]]:
        """Return what was found, in rows for a table."""
        rows = [
            (
                f"loss of a cycle to {lr:.2g}",
                ", ".join(f"{loss:.4g}" if math.isfinite(loss) else "diverged" for loss in losses),
            )
            for lr, losses in self.losses.items()
        ]
        spread = f" ({min(self.of_each):.2g} to {max(self.of_each):.2g})"
        alone = len(self.of_each) == 1
        rows.append(("cycles are lowest with", f"{self.lowest:.2g}{'' if alone else spread}"))
        if self.updates is not None:
            rows.append((f"of which {self.updates} updates bear", f"{self.shrinkage:.2g}"))
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it; losses of cycles that diverged are null."""
        cycles = [
            {"max_lr": lr, "losses": [loss if math.isfinite(loss) else None for loss in losses]}
            for lr, losses in self.losses.items()
        ]
        return {
            "steps": self.steps,
            "updates": self.updates,
            "lowest": self.lowest,
            "of_each_run": self.of_each,
            "cycles": cycles,
        }

    def _lowest_of(self, losses: Array) -> float:
        """Return where a parabola over log(lr) is lowest, near the lowest of these losses."""
        maxima = np.array(list(self.losses))
        order = np.argsort(maxima)
        x, y = np.log(maxima[order]), losses[order]
        low = int(np.argmin(y))
        near = slice(max(low - _REACH, 0), low + _REACH + 1)
        x, y = x[near], y[near]
        # A cycle that keeps less than half of the gain tells of the edge, not of the basin.
        basin = np.isfinite(y) & (y <= (y.min() + self.begin) / 2)
        if basin.sum() < 3:
            return float(maxima[order][low])
        bend, slope, _ = np.polyfit(x[basin], y[basin], 2)
        vertex = -slope / (2 * bend) if bend > 0 else math.log(maxima[order][low])
        return float(np.exp(np.clip(vertex, x[basin][0], x[basin][-1])))


def refine(
    train: Callable[[float, int], Run],
    around: float,
    *,
    repeats: int,
    steps: int,
    updates: int | None = None,
) -> Refinement:
    """Train short cycles with maxima a factor of 2 apart, until the best lies among them.

    Args:
        train: from a maximum and the number of a repeat to what a cycle of `steps` updates noted.
        around: the maximum in the middle.
        repeats: cycles of each maximum.
        steps: updates of a cycle.
        updates: of the training that is to follow.

    Raises:
        ValueError: the loss of every cycle stops being finite.
    """
    begins: list[float] = []
    losses: dict[int, tuple[float, ...]] = {}

    def attempt(place: int) -> None:
        runs = [train(around * _FACTOR**place, repeat) for repeat in range(repeats)]
        begins.extend(run.losses[0] for run in runs if run.losses and math.isfinite(run.losses[0]))
        losses[place] = tuple(_end_of(run, steps) for run in runs)

    for place in range(-_REACH, _REACH + 1):
        attempt(place)
    while True:
        lowest = min(losses, key=lambda place: sum(losses[place]))
        beyond = {lowest - 1, lowest + 1} - set(losses)
        if not beyond or abs(lowest) == _FARTHEST:
            break
        attempt(*beyond)
    if not any(map(math.isfinite, map(sum, losses.values()))):
        least = around * _FACTOR ** min(losses)
        raise ValueError(
            f"a short cycle must keep its loss finite, but none did, down to a maximum of "
            f"{least:.2g}; without `refine` the suggestion is that of the range test alone."
        )
    tried = {around * _FACTOR**place: losses[place] for place in sorted(losses)}
    return Refinement(tried, float(np.mean(begins or [math.inf])), steps, updates)


def _end_of(run: Run, steps: int) -> float:
    """Return the mean loss of the last tenth, infinite where that is not finite."""
    last = float(np.mean(run.losses[-max(1, steps // 10) :]))
    return last if math.isfinite(last) and run.end != "divergence" else math.inf


def refuse_updates(refines: bool, updates: int | None) -> None:
    """Refuse a length of training where no short cycles are trained, which alone it is for.

    Raises:
        ValueError: it is given without them, or below 1.
    """
    if updates is not None and not refines:
        raise ValueError(
            "`updates` must be given with `refine` alone: a range test has no use of it."
        )
    if updates is not None and updates < 1:
        raise ValueError(f"`updates` must be at least 1, but is {updates} instead.")


def short_cycle(block: Mapping[str, Any], max_lr: float, steps: int) -> dict[str, Any]:
    """Return a OneCycle block with this maximum and length, else as it is: its halves, its momenta.

    >>> params = {"cycle_first_step_size": 300, "cycle_second_step_size": 700}
    >>> short_cycle({"type": "OneCycle", "params": params}, 0.5, 100)["params"]
    ... # doctest: +NORMALIZE_WHITESPACE
    {'cycle_min_lr': 0.05, 'cycle_max_lr': 0.5,
     'cycle_first_step_size': 30, 'cycle_second_step_size': 70}
    """
    params = block["params"]
    kept = {name: value for name, value in params.items() if name in _MOMENTUM}
    first, second = (params.get(f"cycle_{half}_step_size") for half in ("first", "second"))
    known = isinstance(first, int) and isinstance(second, int)
    climb = min(max(1, round(steps * first / (first + second))) if known else steps // 2, steps - 1)
    sizes = {"cycle_first_step_size": climb, "cycle_second_step_size": steps - climb}
    bounds = {"cycle_min_lr": max_lr / 10, "cycle_max_lr": max_lr}
    return {"type": "OneCycle", "params": {**kept, **bounds, **sizes}}

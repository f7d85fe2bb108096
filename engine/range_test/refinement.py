"""Refine a suggested maximum learning rate with short 1Cycle runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.range_test.recorder import Run
from schedules.core.durations import Horizon, convert_to_steps, get_unit

__all__ = ["Refinement", "build_short_cycle", "check_training_steps", "refine"]

_FACTOR = 2.0  # ratio of neighboring maxima
_REACH = 2  # number of maxima on each side of the best one to which the parabola is fitted
_FARTHEST = 6  # largest power of `_FACTOR` by which a maximum differs from the first one
_HORIZON = 0.32  # see Refinement.max_lr
_HALVES = ("first", "second")
_MOMENTUM = ("cycle_momentum", "cycle_min_mom", "cycle_max_mom")
# The ratio of two durations of the same unit is the same in every run.
_ANY_RUN = Horizon(total_steps=10**12, steps_per_epoch=1, samples_per_step=1, tokens_per_sample=1)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Refinement:
    """Results of short 1Cycle runs with different maximum learning rates.

    >>> tried = {0.01 * 2**k: (1 + (k - 0.5) ** 2 / 10,) for k in range(-2, 3)}
    >>> round(Refinement(tried, initial_loss=3.0, steps=250).lowest, 4)  # between 0.01 and 0.02
    0.0141
    >>> # The planned training is 10 times as long:
    >>> Refinement(tried, initial_loss=3.0, steps=250, training_steps=2500).max_lr
    0.0068
    """

    losses: Mapping[float, tuple[float, ...]]
    """Final losses by maximum learning rate, one per repeat; infinite for runs that diverged."""
    initial_loss: float
    """Loss at the first step, averaged over all short runs."""
    steps: int
    """Number of steps in each short run."""
    training_steps: int | None = None
    """Number of steps in the planned training run; None if it equals `steps`."""

    @cached_property
    def lowest(self) -> float:
        """The peak learning rate that gives the lowest final loss in a short 1Cycle run.

        The value is estimated as the vertex of a parabola fitted to the final losses at the best
        learning rate tried and its neighbors.
        """
        return self._find_lowest(np.array(list(self.losses.values())).mean(axis=1))

    @property
    def lowest_per_repeat(self) -> list[float]:
        """Value of `lowest` for each repeat, computed only from the short runs of that repeat."""
        return [self._find_lowest(column) for column in np.array(list(self.losses.values())).T]

    @property
    def shrinkage(self) -> float:
        """Factor that reduces the suggestion if the planned training is longer than the short runs.

        The factor is ``(steps / training_steps) ** 0.32``, but at most 1.
        """
        return (
            1.0
            if self.training_steps is None
            else min(1.0, (self.steps / self.training_steps) ** _HORIZON)
        )

    @property
    def max_lr(self) -> float:
        """The suggested maximum learning rate: ``lowest * shrinkage``, to two significant digits.

        The optimal learning rate decreases as a power of the number of training steps. The exponent
        in `shrinkage` is from Bjorck et al., Scaling Optimal LR Across Token Horizons,
        https://arxiv.org/abs/2409.19913.
        """
        return float(f"{self.lowest * self.shrinkage:.2g}")

    def to_rows(self) -> list[tuple[str, str]]:
        """Return the results as (label, value) rows of a table."""
        rows = [
            (
                f"final loss with cycle_max_lr {lr:.2g}",
                ", ".join(f"{loss:.4g}" if math.isfinite(loss) else "diverged" for loss in losses),
            )
            for lr, losses in self.losses.items()
        ]
        spread = f" ({min(self.lowest_per_repeat):.2g} to {max(self.lowest_per_repeat):.2g})"
        is_single = len(self.lowest_per_repeat) == 1
        rows.append(
            ("best cycle_max_lr of short cycles", f"{self.lowest:.2g}{'' if is_single else spread}")
        )
        if self.training_steps is not None:
            rows.append(
                (f"factor for {self.training_steps} training steps", f"{self.shrinkage:.2g}")
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the results as a JSON-compatible dict. Losses of diverged runs are None."""
        cycles = [
            {"max_lr": lr, "losses": [loss if math.isfinite(loss) else None for loss in losses]}
            for lr, losses in self.losses.items()
        ]
        return {
            "steps": self.steps,
            "training_steps": self.training_steps,
            "lowest": self.lowest,
            "of_each_run": self.lowest_per_repeat,
            "cycles": cycles,
        }

    def _find_lowest(self, losses: Array) -> float:
        """Return the learning rate at the minimum of a parabola fitted near the lowest loss.

        The parabola is a function of log(lr).
        """
        maxima = np.array(list(self.losses))
        order = np.argsort(maxima)
        x, y = np.log(maxima[order]), losses[order]
        low = int(np.argmin(y))
        near = slice(max(low - _REACH, 0), low + _REACH + 1)
        x, y = x[near], y[near]
        # Ignore cycles that improve the loss less than half as much as the best cycle, because they
        # are too far from the minimum.
        basin = np.isfinite(y) & (y <= (y.min() + self.initial_loss) / 2)
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
    training_steps: int | None = None,
) -> Refinement:
    """Find the best maximum learning rate with short 1Cycle runs, and return the results.

    The search starts with five maximum learning rates, each twice the previous one. While the best
    value is at an end of the tried range, the search extends the range at that end by a factor of
    2. The search does not try values below `around` / 64 or above `around` x 64.

    Args:
        train: function ``train(max_lr, repeat)`` that trains for one cycle of `steps` steps and
            returns the recorded run. ``repeat`` counts from 0.
        around: middle of the first five maximum learning rates.
        repeats: number of cycles per maximum learning rate.
        steps: number of steps per cycle.
        training_steps: number of steps in the planned training run; None if it equals `steps`.

    Raises:
        ValueError: if runs diverge at every maximum learning rate tried.
    """
    initial_losses: list[float] = []
    losses: dict[int, tuple[float, ...]] = {}

    def attempt(exponent: int) -> None:
        runs = [train(around * _FACTOR**exponent, repeat) for repeat in range(repeats)]
        initial_losses.extend(
            run.losses[0] for run in runs if run.losses and math.isfinite(run.losses[0])
        )
        losses[exponent] = tuple(_final_loss(run, steps) for run in runs)

    for exponent in range(-_REACH, _REACH + 1):
        attempt(exponent)
    while True:
        lowest = min(losses, key=lambda exponent: sum(losses[exponent]))
        beyond = {lowest - 1, lowest + 1} - set(losses)
        if not beyond or abs(lowest) == _FARTHEST:
            break
        attempt(*beyond)
    if not any(map(math.isfinite, map(sum, losses.values()))):
        least = around * _FACTOR ** min(losses)
        raise ValueError(
            "Short 1Cycle runs diverged at every maximum learning rate tried, down to "
            f"{least:.2g}. Omit `refine` to use the suggestion of the range test."
        )
    tried = {around * _FACTOR**exponent: losses[exponent] for exponent in sorted(losses)}
    return Refinement(tried, float(np.mean(initial_losses or [math.inf])), steps, training_steps)


def _final_loss(run: Run, steps: int) -> float:
    """Return the mean loss over the last 10% of the steps, or infinity if the run diverged."""
    last = float(np.mean(run.losses[-max(1, steps // 10) :]))
    return last if math.isfinite(last) and run.end != "divergence" else math.inf


def check_training_steps(is_refined: bool, training_steps: int | None) -> None:
    """Check that `training_steps` is valid and used only with `refine`.

    Args:
        is_refined: whether `refine` is set.
        training_steps: number of steps in the planned training run; None if it was not given.

    Raises:
        ValueError: if `training_steps` is below 1, or is given without `refine`.
    """
    if training_steps is not None and not is_refined:
        raise ValueError(
            "`training_steps` has no effect without `refine`. Set `refine`, or omit "
            "`training_steps`."
        )
    if training_steps is not None and training_steps < 1:
        raise ValueError(
            f"`training_steps` must be >= 1, got {training_steps}. Pass the number of steps of the "
            "planned training run."
        )


def fit_cycle(block: Mapping[str, Any] | None, *, has_length: bool) -> dict[str, Any]:
    """Return a OneCycle block with the params of ``block``, whose cycle fits the run.

    If the config sets the length of the run but not that of the cycle, the cycle takes the whole
    run: the learning rate increases for 30% of the steps and then decreases.

    Args:
        block: scheduler block of the config; None if it has none. The params of other types than
            OneCycle are dropped.
        has_length: whether the config sets ``engine.max_duration``.

    >>> fit_cycle({"type": "WarmupLR", "params": {"warmup_num_steps": 100}}, has_length=True)
    ... # doctest: +NORMALIZE_WHITESPACE
    {'type': 'OneCycle', 'params': {'cycle_first_step_size': '0.3dur',
     'cycle_second_step_size': '0.7dur'}}
    >>> fit_cycle(None, has_length=False)
    {'type': 'OneCycle', 'params': {}}
    """
    params = dict(block.get("params", {})) if block and block["type"] == "OneCycle" else {}
    sizes = {"cycle_first_step_size": "0.3dur", "cycle_second_step_size": "0.7dur"}
    if has_length and params.keys().isdisjoint(sizes):
        params |= sizes
    return {"type": "OneCycle", "params": params}


def build_short_cycle(block: Mapping[str, Any], max_lr: float, steps: int) -> dict[str, Any]:
    """Build the scheduler block of a short cycle from a OneCycle block.

    The short cycle has the same momentum settings and ratio of phase lengths as ``block``.

    Args:
        block: OneCycle scheduler block.
        max_lr: maximum learning rate of the short cycle.
        steps: number of steps of the short cycle.

    >>> params = {"cycle_first_step_size": 300, "cycle_second_step_size": 700}
    >>> build_short_cycle({"type": "OneCycle", "params": params}, 0.5, 100)["params"]
    ... # doctest: +NORMALIZE_WHITESPACE
    {'cycle_min_lr': 0.05, 'cycle_max_lr': 0.5,
     'cycle_first_step_size': 30, 'cycle_second_step_size': 70}
    """
    params = block["params"]
    kept = {name: value for name, value in params.items() if name in _MOMENTUM}
    fraction = _compute_climb_fraction(*(params.get(f"cycle_{half}_step_size") for half in _HALVES))
    climb = min(max(1, round(steps * fraction)), steps - 1)
    sizes = {"cycle_first_step_size": climb, "cycle_second_step_size": steps - climb}
    bounds = {"cycle_min_lr": max_lr / 10, "cycle_max_lr": max_lr}
    return {"type": "OneCycle", "params": {**kept, **bounds, **sizes}}


def _compute_climb_fraction(first: float | str | None, second: float | str | None) -> float:
    """Return the fraction of a cycle in which the learning rate increases.

    Return 0.5 if a duration is not set, or if the durations have different units.

    >>> _compute_climb_fraction(300, 700), _compute_climb_fraction("0.3dur", "0.7dur")
    (0.3, 0.3)
    >>> _compute_climb_fraction("1ep", "3ep"), _compute_climb_fraction(300, "900ba")
    (0.25, 0.25)
    >>> _compute_climb_fraction(300, None), _compute_climb_fraction(300, "2ep")
    (0.5, 0.5)
    """
    if first is None or second is None:
        return 0.5
    climb, descent = (convert_to_steps(each, _ANY_RUN, scaled=True) for each in (first, second))
    is_same_unit = (get_unit(first) or "ba") == (get_unit(second) or "ba")
    return climb / (climb + descent) if is_same_unit and climb + descent else 0.5

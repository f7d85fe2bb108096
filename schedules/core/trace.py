"""What every update of a run would use, as arrays: the same curves that the binder writes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from schedules.core.controller import Base, Evidence, Values
from schedules.core.durations import Horizon
from schedules.core.registry import from_config
from schedules.core.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DEFAULT_BASE", "Replay", "replay", "trace"]

DEFAULT_BASE: Base = {"lr": (0.1,), "momentum": (0.9,), "weight_decay": (0.0,)}
"""Base values of a single param group, for a schedule that is evaluated without an optimizer."""


def trace(
    schedule: Mapping[str, Any] | Schedule[Any],
    steps: int,
    *,
    base: Mapping[str, Iterable[float]] | None = None,
    horizon: Horizon | None = None,
    losses: Iterable[float] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return the value of each driven hyperparameter at each of the first ``steps`` updates.

    Args:
        schedule: a schedule, or the ``{"type": …, "params": {…}}`` block of one.
        steps: how many updates, from 0.
        base: one value a param group, as the optimizer was built; by default a single group
            with lr 0.1, momentum 0.9 and weight decay 0.
        horizon: the run, where durations are time strings or are scaled.
        losses: of each update (or the metrics), for a schedule that listens to them; without them
            it is shown on a synthetic one.

    Returns:
        An array of shape (steps, groups) for each of "lr", "momentum", … that is driven.

    Raises:
        ValueError: the block is wrong, or the base values do not fit the schedule; or there are
            too few losses.
    """
    import numpy as np

    if not isinstance(schedule, Schedule):
        schedule = from_config(schedule)
    given: Base = {name: tuple(values) for name, values in (base or DEFAULT_BASE).items()}
    groups = len(given["lr"])
    defaults: Base = {name: value * groups for name, value in DEFAULT_BASE.items()}
    if losses is not None and schedule.feedback is not None:
        told = itertools.islice(losses, steps - 1)
        rows = replay(schedule, told, base={**defaults, **given}, horizon=horizon).rows
        if len(rows) < steps:
            raise ValueError(
                f"there must be a loss for each of {steps - 1} updates, but {len(rows) - 1} are."
            )
        return {name: np.array([row[name] for row in rows]) for name in schedule.drives}
    curves = schedule.curves_for({**defaults, **given}, horizon)
    values = {}
    for name, of_groups in curves.items():
        arrays = {curve: curve.array(steps) for curve in set(of_groups)}
        columns = [arrays[curve][:, np.newaxis] for curve in of_groups]
        values[name] = columns[0] if len(columns) == 1 else np.hstack(columns)
    return values


class Replay(NamedTuple):
    """The values of a schedule on recorded losses."""

    rows: list[Values]
    """Values of each step, and of the step after the last loss."""
    evidence: Evidence | None
    """Data behind its last decision, if it made one."""


def replay(
    schedule: Schedule[Any],
    losses: Iterable[float],
    *,
    base: Base,
    horizon: Horizon | None = None,
) -> Replay:
    """Run a schedule on recorded losses.

    Args:
        schedule: schedule to run, with feedback or without.
        losses: loss (or metric) of each step.
        base: value of each driven hyperparameter, one per param group.
        horizon: length of the run, for time strings and scaling.
    """
    controller = schedule.bind(base, horizon)
    state = controller.init()
    rows, evidence = [controller.values(state)], None
    for loss in losses:
        before, state = state, controller.update(state, float(loss))
        rows.append(controller.values(state))
        decision = controller.decision(state)
        if decision is not None and decision.step == len(rows) - 1:
            evidence = controller.evidence(before, float(loss), state)
    return Replay(rows, evidence)

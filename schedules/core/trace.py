"""What every update of a run would use, as arrays: the same curves that the binder writes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from schedules.core.durations import Horizon
from schedules.core.registry import from_config
from schedules.core.schedule import Base, Schedule, Values
from schedules.feedback.base import Evidence, FeedbackSchedule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Replay", "replay", "trace"]


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
    given: Base = {name: tuple(values) for name, values in (base or {"lr": (0.1,)}).items()}
    groups = len(given["lr"])
    defaults: Base = {"momentum": (0.9,) * groups, "weight_decay": (0.0,) * groups}
    if losses is not None and isinstance(schedule, FeedbackSchedule):
        told = itertools.islice(losses, steps - 1)
        rows = replay(schedule, told, base={**defaults, **given}, horizon=horizon).rows
        if len(rows) < steps:
            raise ValueError(
                f"there must be a loss for each of {steps - 1} updates, but {len(rows) - 1} are."
            )
        return {name: np.array([row[name] for row in rows]) for name in schedule.drives}
    curves = schedule.bind({**defaults, **given}, horizon).curves
    values = {}
    for name, of_groups in curves.items():
        arrays = {curve: curve.array(steps) for curve in set(of_groups)}
        columns = [arrays[curve][:, np.newaxis] for curve in of_groups]
        values[name] = columns[0] if len(columns) == 1 else np.hstack(columns)
    return values


class Replay(NamedTuple):
    """What a schedule that listens does on recorded losses."""

    rows: list[Values]
    """Of each update, and of the one that would come after the last loss."""
    evidence: Evidence | None
    """What its switch rests on, if there is one."""


def replay(
    schedule: FeedbackSchedule[Any],
    losses: Iterable[float],
    *,
    base: Base,
    horizon: Horizon | None = None,
) -> Replay:
    """Tell a schedule recorded losses, in their order.

    Args:
        schedule: one that listens.
        losses: of each update, or the metrics.
        base: all that it drives, one value a param group.
        horizon: the run, where durations are time strings or are scaled.
    """
    rule = schedule.control(base, horizon)
    state = rule.init()
    rows, evidence = [rule.values(state)], None
    for loss in losses:
        before, state = state, rule.update(state, float(loss))
        rows.append(rule.values(state))
        if rule.switched(state):
            evidence = rule.evidence(before, float(loss), state)
    return Replay(rows, evidence)

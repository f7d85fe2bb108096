"""Compute the values of a schedule for every step of a run, without an optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from schedules.core.controller import DEFAULT_BASE, Base, Evidence, Values
from schedules.core.durations import Horizon
from schedules.core.registry import from_config
from schedules.core.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DEFAULT_BASE", "Replay", "complete_base", "replay", "trace"]


def trace(
    schedule: Mapping[str, Any] | Schedule[Any],
    steps: int,
    *,
    base: Mapping[str, float | Iterable[float]] | None = None,
    horizon: Horizon | None = None,
    losses: Iterable[float] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return the values of each scheduled hyperparameter for the first ``steps`` steps.

    Args:
        schedule: `Schedule`, or a ``{"type": …, "params": {…}}`` block.
        steps: number of steps, starting with step 0.
        base: initial hyperparameters of the optimizer, each a number or a list with one
            number per param group. The defaults are a learning rate of 0.1, a momentum of 0.9 and
            a weight decay of 0.
        horizon: length of the run and of its epochs, used to convert time strings such as
            ``"10ep"`` to steps, and to scale durations.
        losses: loss (or metric) at each step, for feedback schedules. Defaults to a synthetic loss.

    Returns:
        A dict that maps the name of each scheduled hyperparameter ("lr", "momentum" or
        "weight_decay") to its values, an array of shape (steps, groups).

    Raises:
        ValueError: the block is invalid, ``base`` has an unknown name, the schedule is incompatible
            with the initial hyperparameters, or there are too few losses.
    """
    import numpy as np

    if not isinstance(schedule, Schedule):
        schedule = from_config(schedule)
    initial = complete_base(base)
    if losses is not None and schedule.feedback is not None:
        used = itertools.islice(losses, steps - 1)
        rows = replay(schedule, used, base=initial, horizon=horizon).rows
        if len(rows) < steps:
            raise ValueError(
                f"`losses` must have at least {steps - 1} values for {steps} steps, "
                f"got {len(rows) - 1}. Pass more losses or reduce `steps`."
            )
        return {name: np.array([row[name] for row in rows]) for name in schedule.hyperparameters}
    curves = schedule.build_curves(initial, horizon)
    values = {}
    for name, of_groups in curves.items():
        arrays = {curve: curve.array(steps) for curve in set(of_groups)}
        columns = [arrays[curve][:, np.newaxis] for curve in of_groups]
        values[name] = columns[0] if len(columns) == 1 else np.hstack(columns)
    return values


def complete_base(base: Mapping[str, float | Iterable[float]] | None) -> Base:
    """Return initial hyperparameters, with the missing ones taken from `DEFAULT_BASE`.

    Args:
        base: initial hyperparameters, each a number for all param groups or a list with one number
            per group.

    Raises:
        ValueError: a name is unknown, lists with more than one number have different lengths, or a
            list is empty.

    >>> complete_base({"lr": [0.1, 0.2]})
    {'lr': (0.1, 0.2), 'momentum': (0.9, 0.9), 'weight_decay': (0.0, 0.0)}
    """
    given = dict(DEFAULT_BASE)
    for name, values in (base or {}).items():
        if name not in DEFAULT_BASE:
            raise ValueError(
                f"`base` may contain only the keys {', '.join(DEFAULT_BASE)}, but it contains "
                f"{name!r}. Remove this key."
            )
        given[name] = (values,) if isinstance(values, int | float) else tuple(values)
    groups = max(map(len, given.values()))
    for name, each in given.items():
        if len(each) not in {1, groups}:
            raise ValueError(
                f"`base` must have the same number of values for each hyperparameter, got "
                f"{len(each)} for `{name}` and {groups} for another hyperparameter. Set each "
                "to a number or to a list with one number per param group."
            )
    return {name: each * (groups // len(each)) for name, each in given.items()}


class Replay(NamedTuple):
    """Result of `replay`: hyperparameters at each step, and evidence for the latest decision."""

    rows: list[Values]
    """Hyperparameters at each step, including the step after the final loss."""
    evidence: Evidence | None
    """Losses and learning rates that led to the latest decision, such as the end of the warmup.

    None if the schedule made no decision or does not record its losses.
    """


def replay(
    schedule: Schedule[Any],
    losses: Iterable[float],
    *,
    base: Base,
    horizon: Horizon | None = None,
) -> Replay:
    """Run a schedule on recorded losses, and return the hyperparameters at each step.

    Args:
        schedule: schedule to run. Schedules without feedback ignore the losses.
        losses: loss (or metric) at each step.
        base: initial hyperparameters of the optimizer, with one value per param group.
        horizon: length of the run and of its epochs, used to convert time strings such as
            ``"10ep"`` to steps, and to scale durations.
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

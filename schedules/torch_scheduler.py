"""`attach`, which attaches a schedule to an optimizer, and `ScheduleBinder`, which it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from schedules.binding.binder import ScheduleBinder
from schedules.binding.metric_binder import MetricBinder
from schedules.binding.saved_state import BaseValues
from schedules.core.durations import Horizon
from schedules.core.registry import build, find, from_config, to_class
from schedules.core.schedule import Schedule

__all__ = ["MetricBinder", "ScheduleBinder", "attach", "bind"]


def attach(
    schedule: str | Mapping[str, Any] | Schedule[Any] | Callable[..., Any],
    optimizer: Optimizer,
    *,
    horizon: Horizon | None = None,
    base: BaseValues | None = None,
    at: int = 0,
    **params: Any,
) -> ScheduleBinder:
    """Attach a schedule to an optimizer, for use in a custom training loop.

    Args:
        schedule: name of a schedule, a ``{"type": …, "params": {…}}`` block, a `Schedule`, a
            function that maps the step to a learning rate factor, or a PyTorch scheduler class.
        optimizer: optimizer whose hyperparameters the schedule sets.
        horizon: length of the run, used to convert time strings to steps and to scale durations.
        base: initial learning rate of all param groups, or a list with one value per group. To set
            other hyperparameters too, pass a dict that maps "lr", "momentum" and "weight_decay" to
            such values. Defaults to the optimizer's current values or, if another schedule has set
            them, to the initial values of that schedule.
        at: step at which the schedule starts.
        **params: parameters of the schedule, if ``schedule`` is a name, a function or a class.

    Raises:
        ScheduleError: a parameter of the schedule is invalid.
        ValueError: the name is unknown, or the schedule is incompatible with the optimizer.

    >>> import torch
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    >>> attach("WarmupLR", optimizer, warmup_num_steps=10).get_last_lr()
    [0.0]
    """
    if isinstance(schedule, Mapping | Schedule):
        if params:
            raise ValueError(
                "Schedule parameters can be passed as keywords only if `schedule` is a name, a "
                f"function or a class, got {', '.join(params)} with {schedule!r}. Set them in the "
                "schedule itself."
            )
        built = schedule if isinstance(schedule, Schedule) else from_config(schedule)
    else:
        if params.pop("last_epoch", -1) != -1:
            raise ValueError(
                "`last_epoch` must be -1 or absent. Pass `at` to start at a later step, or load a "
                "saved state with load_state_dict()."
            )
        if isinstance(schedule, str):
            cls = find(schedule)
        else:
            name = getattr(schedule, "__qualname__", type(schedule).__qualname__)
            cls = to_class(f"{schedule.__module__}:{name}", schedule)
        built = build(cls, params)
    return ScheduleBinder(built, optimizer, horizon=horizon, base=base, at=at)


def bind(
    schedule: Schedule[Any], optimizer: Optimizer, *, horizon: Horizon | None = None
) -> ScheduleBinder:
    """Attach a `Schedule` to an optimizer.

    Raises:
        ValueError: the schedule is incompatible with the optimizer, or requires the length of the
            run but ``horizon`` does not specify it.
    """
    return ScheduleBinder(schedule, optimizer, horizon=horizon)

"""Attach a schedule to an optimizer with `attach`, which returns a `ScheduleBinder`."""

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
from schedules.families.per_group import PerGroup

__all__ = ["MetricBinder", "ScheduleBinder", "attach", "bind"]


def attach(
    schedule: str | Mapping[Any, Any] | Schedule[Any] | Callable[..., Any],
    optimizer: Optimizer,
    *,
    horizon: Horizon | None = None,
    base: BaseValues | None = None,
    at: int = 0,
    **params: Any,
) -> ScheduleBinder:
    """Attach a schedule to an optimizer in a custom training loop, and return a `ScheduleBinder`.

    Args:
        schedule: name of a schedule, a ``{"type": …, "params": {…}}`` block, a `Schedule`, a
            function that maps the step to a learning rate factor, or a PyTorch scheduler class. To
            use a different schedule for each param group, pass a dict that maps the index or the
            ``"name"`` of a group to one of these. Groups that are not in the dict keep their
            initial values.
        optimizer: optimizer whose hyperparameters the schedule sets.
        horizon: length of the run and of its epochs, used to convert time strings such as "10ep" to
            steps, and to scale durations.
        base: initial learning rate of all param groups, or a list with one value per group. To set
            other hyperparameters too, pass a dict that maps "lr", "momentum" and "weight_decay" to
            such values. Defaults to the optimizer's current values or, if another schedule has set
            them, to the initial values of that schedule.
        at: step of the schedule to start from (default: 0, the beginning of the schedule).
        **params: parameters of the schedule, if ``schedule`` is a name, a function or a class.

    Raises:
        ScheduleError: a parameter of the schedule is invalid.
        ValueError: the name is unknown, the schedule is incompatible with the optimizer, or the
            optimizer has no param group with the given index or name.

    >>> import torch
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    >>> attach("WarmupLR", optimizer, warmup_num_steps=10).get_last_lr()
    [0.0]
    """
    is_name = not isinstance(schedule, Mapping | Schedule)
    if params and not is_name:
        raise ValueError(
            "`schedule` must be a name, a function or a class if parameters "
            f"({', '.join(params)}) are passed as keywords, got {schedule!r}. Set the parameters "
            "in the schedule itself."
        )
    if is_name and params.pop("last_epoch", -1) != -1:
        raise ValueError(
            "`last_epoch` must be -1 or absent. Pass `at` to start at a later step, or load a "
            "saved state with load_state_dict()."
        )
    if isinstance(schedule, Mapping) and not isinstance(schedule.get("type"), str):
        built: Schedule[Any] = _build_per_group(schedule, optimizer)
    else:
        built = _build(schedule, params)
    return ScheduleBinder(built, optimizer, horizon=horizon, base=base, at=at)


def _build(schedule: Any, params: Mapping[str, Any]) -> Schedule[Any]:
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, Mapping):
        return from_config(schedule)
    if isinstance(schedule, str):
        return build(find(schedule), params)
    name = getattr(schedule, "__qualname__", type(schedule).__qualname__)
    return build(to_class(f"{schedule.__module__}:{name}", schedule), params)


def _build_per_group(schedules: Mapping[Any, Any], optimizer: Optimizer) -> PerGroup:
    groups = optimizer.param_groups
    found: dict[int, Schedule[Any]] = {}
    for key, schedule in schedules.items():
        indices = [index for index, group in enumerate(groups) if key in (index, group.get("name"))]
        if not indices:
            names = [repr(group["name"]) for group in groups if "name" in group]
            named = f", named {', '.join(names)}" if names else ""
            raise ValueError(
                f"The keys of `schedule` must be indices or names of param groups, got {key!r}. "
                f"The optimizer has {len(groups)} param group{'' if len(groups) == 1 else 's'}"
                f"{named}."
            )
        twice = [index for index in indices if index in found]
        if twice:
            raise ValueError(
                "`schedule` must have at most one key per param group, got two keys for param "
                f"group {twice[0]}. Remove one of them, for example {key!r}."
            )
        found |= dict.fromkeys(indices, _build(schedule, {}))
    if not found:
        raise ValueError(
            "`schedule` must map at least one param group to a schedule, got an empty dict. Add a "
            "schedule."
        )
    return PerGroup(schedulers=tuple(found.get(index) for index in range(len(groups))))


def bind(
    schedule: Schedule[Any], optimizer: Optimizer, *, horizon: Horizon | None = None
) -> ScheduleBinder:
    """Attach a `Schedule` to an optimizer, and return the `ScheduleBinder`.

    Raises:
        ValueError: the schedule is incompatible with the optimizer, or requires the length of the
            run but ``horizon`` does not specify it.
    """
    return ScheduleBinder(schedule, optimizer, horizon=horizon)

"""Apply param group keys that other libraries add, such as timm's ``lr_scale``.

- ``lr_scale`` (timm, fairseq, MAE) and ``lr_mult`` (earlier versions of Megatron-LM) multiply the
  scheduled learning rate. ``wd_mult`` (Megatron-LM) multiplies the scheduled weight decay.
- ``max_lr``, ``min_lr``, ``start_wd`` and ``end_wd`` (Megatron-LM) override the schedule's
  parameters of the same name, in schedules that list these names in `Schedule.group_keys`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from schedules.core.combinators import scale
from schedules.core.controller import Base, Controller, OpenLoop
from schedules.core.durations import Horizon
from schedules.core.per_group import are_equal, broadcast
from schedules.core.schedule import Schedule
from schedules.param_groups import Group

__all__ = ["bind_to_groups"]

_MULTIPLIERS = {"lr": ("lr_scale", "lr_mult"), "weight_decay": ("wd_mult",)}
_REPLACEMENTS = ("max_lr", "min_lr", "start_wd", "end_wd")
_WRITTEN_BY_ONE_CYCLE_LR = {"initial_lr", "max_lr", "min_lr"}
"""Keys that PyTorch's OneCycleLR adds to param groups, and thus to the optimizer's saved state."""


def bind_to_groups(
    schedule: Schedule[Any], base: Base, horizon: Horizon | None, groups: Sequence[Group]
) -> Controller[Any]:
    """Return a controller that runs a schedule and applies param group keys such as ``lr_scale``.

    Args:
        schedule: schedule to bind.
        base: initial hyperparameters, not yet multiplied by the factors in the groups.
        horizon: length of the run.
        groups: param groups of the optimizer.

    Raises:
        ValueError: the schedule is incompatible with the param groups or with one of their keys.
    """
    controller = _replace_parameters(schedule, groups).bind(base, horizon)
    factors = {name: _read_factors(name, groups) for name in schedule.hyperparameters}
    if all(factor == 1 for in_groups in factors.values() for factor in in_groups):
        return controller
    index, key = _find_factor(schedule.hyperparameters, groups)
    if not isinstance(controller, OpenLoop):
        raise ValueError(  # noqa: TRY004  # it is a value of the optimizer
            f"{schedule.type_name} does not support the key `{key}` in param groups, but param "
            f"group {index} sets `{key}` to {groups[index][key]:g}. Remove the key, and multiply "
            f"the group's initial learning rate or weight decay by {groups[index][key]:g}."
        )
    if "lr" in factors:
        _check_not_applied(base["lr"], factors["lr"], groups)
    scale_once = functools.cache(scale)
    return OpenLoop(
        {
            name: tuple(map(scale_once, curves, factors[name]))
            for name, curves in controller.curves.items()
        }
    )


def _read_factors(hyperparameter: str, groups: Sequence[Group]) -> tuple[float, ...]:
    keys = _MULTIPLIERS.get(hyperparameter, ())
    return tuple(math.prod(float(group.get(key, 1.0)) for key in keys) for group in groups)


def _find_factor(names: Sequence[str], groups: Sequence[Group]) -> tuple[int, str]:
    """Find the first param group with a factor other than 1 for a hyperparameter in ``names``.

    Return the index of the group and the key of the factor, such as ``lr_scale``.
    """
    keys = [key for name in names for key in _MULTIPLIERS.get(name, ())]
    return next(
        (index, key) for index, group in enumerate(groups) for key in keys if group.get(key, 1) != 1
    )


def _check_not_applied(
    lrs: Sequence[float], factors: Sequence[float], groups: Sequence[Group]
) -> None:
    """Raise an error if the learning rates already include the factors.

    For example, MMDetection's layer-wise decay multiplies ``lr`` by ``lr_scale``, and keeps
    ``lr_scale`` in the param group.
    """
    if are_equal(tuple(lrs)) or 0 in factors:
        return
    before = tuple(lr / factor for lr, factor in zip(lrs, factors, strict=True))
    if are_equal(before):
        key = _find_factor(["lr"], groups)[1]
        raise ValueError(
            f"The schedule multiplies the learning rate of each param group by the group's "
            f"`{key}`, but the learning rates ({', '.join(f'{lr:g}' for lr in lrs)}) already "
            "include this factor. Remove the key, or give all groups the same learning rate."
        )


def _replace_parameters(schedule: Schedule[Any], groups: Sequence[Group]) -> Schedule[Any]:
    """Return the schedule with its parameters replaced by param group keys of the same name."""
    changes = {}
    for key in _REPLACEMENTS:
        index = next((index for index, group in enumerate(groups) if key in group), None)
        if index is None:
            continue
        is_decay = key.endswith("_wd")
        if key in schedule.group_keys and (
            not is_decay or "weight_decay" in schedule.hyperparameters
        ):
            own = broadcast(key, getattr(schedule, key) or 0.0, (0.0,) * len(groups))
            changes[key] = [
                float(group.get(key, value)) for group, value in zip(groups, own, strict=True)
            ]
        elif key == "max_lr" and not groups[index].keys() >= _WRITTEN_BY_ONE_CYCLE_LR:
            raise ValueError(
                f"{schedule.type_name} does not support the key `{key}` in param groups, but param "
                f"group {index} sets `{key}` to {groups[index][key]:g}. Set the learning rates of "
                "the schedule to lists with one value per param group, and remove the key."
            )
    return dataclasses.replace(schedule, **changes) if changes else schedule

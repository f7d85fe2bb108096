"""What a config's schedule will drive its optimizer by, as far as the file alone tells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.config.horizon import horizon_of
from engine.config.schema import optimizer_name, optimizer_schema, with_defaults
from schedules import Horizon, Schedule
from schedules.core.schedule import Base

__all__ = ["base_of", "horizon_if_known", "resolved_if_known"]

# What an optimizer starts from where the config names none.
_NO_OPTIMIZER = {"lr": 1e-3, "betas": [0.9], "weight_decay": 0.0}


def horizon_if_known(schedule: Schedule[Any], config: Mapping[str, Any]) -> Horizon | None:
    """Return the run that a schedule is resolved against, as far as a file says how long it is.

    Only the loader knows an epoch and, where two of the three batch sizes are given, only the
    launch knows a batch: None where one of them is needed, which is proved when the run starts.
    """
    run = config.get("engine", {})
    texts = f"{run.get('max_duration')} {list(vars(schedule).values())}".lower()
    samples = config.get("train_batch_size")
    if not isinstance(samples, int):
        samples = None
    if re.search(r"\d\s*ep\b", texts) or (samples is None and re.search(r"\d\s*sp\b", texts)):
        return None
    return horizon_of(run, samples_per_step=samples, steps_per_epoch=None)


def resolved_if_known(schedule: Schedule[Any], config: Mapping[str, Any]) -> Schedule[Any] | None:
    """Return a schedule with its durations in updates; None where the file does not say them.

    Raises:
        ScheduleError: a duration comes to no update, or they are at odds with one another.
    """
    horizon = horizon_if_known(schedule, config)
    return None if horizon is None else schedule.resolve(horizon)


def base_of(config: Mapping[str, Any], schedule: Schedule[Any]) -> Base:
    """Return what the config's optimizer is built with, for as many groups as are listed."""
    block = config.get("optimizer")
    params: Mapping[str, Any] = _NO_OPTIMIZER
    if block is not None:
        name = optimizer_name(block["type"])
        assert name is not None
        given = {key: value for key, value in block.get("params", {}).items() if value != "auto"}
        params = with_defaults(given, optimizer_schema(name))
    momentum = params.get("momentum", params.get("betas", (0.0,))[0] if "betas" in params else 0.0)
    lists = [value for value in vars(schedule).values() if isinstance(value, tuple)]
    groups = max(map(len, lists), default=1)
    base = {"lr": params["lr"], "momentum": momentum, "weight_decay": params["weight_decay"]}
    return {name: (value,) * groups for name, value in base.items()}

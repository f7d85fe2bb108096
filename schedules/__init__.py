"""Schedules of learning rate, momentum and weight decay, as data and as pure functions of the step.

>>> import schedules
>>> block = {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}}
>>> schedules.trace(block, 4, base={"lr": (0.1,)})["lr"][:, 0].tolist()
[0.0, 0.05, 0.1, 0.1]

Each schedule is here by its name, ``schedules.OneCycle`` as ``schedules.CosineAnnealingLR``. Only
`ScheduleBinder` and `attach` need torch. What is heavy is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from schedules.core.controller import Base, Controller, OpenLoop
from schedules.core.durations import Horizon
from schedules.core.registry import SCHEDULES, find, from_config, register
from schedules.core.schedule import Schedule, ScheduleError
from schedules.core.trace import trace

if TYPE_CHECKING:
    from schedules.families.composites import ChainedScheduler, Combined, SequentialLR
    from schedules.families.deepspeed import (
        LRRangeTest,
        OneCycle,
        WarmupCosineLR,
        WarmupDecayLR,
        WarmupLR,
    )
    from schedules.feedback.autowu import AutoWU
    from schedules.feedback.base import FeedbackSchedule
    from schedules.feedback.plateau import ReduceLROnPlateau
    from schedules.torch_scheduler import ScheduleBinder, attach, bind

__all__ = [
    "SCHEDULES",
    "AutoWU",
    "Base",
    "ChainedScheduler",
    "Combined",
    "Controller",
    "FeedbackSchedule",
    "Horizon",
    "LRRangeTest",
    "OneCycle",
    "OpenLoop",
    "ReduceLROnPlateau",
    "Schedule",
    "ScheduleBinder",
    "ScheduleError",
    "SequentialLR",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "attach",
    "bind",
    "find",
    "from_config",
    "register",
    "trace",
]


_HOMES = {
    "FeedbackSchedule": "feedback.base",
    "ScheduleBinder": "torch_scheduler",
    "attach": "torch_scheduler",
    "bind": "torch_scheduler",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"schedules.{_HOMES[name]}"), name)
    if name in SCHEDULES:
        return SCHEDULES[name]
    raise AttributeError(f"module 'schedules' has no attribute {name!r}")

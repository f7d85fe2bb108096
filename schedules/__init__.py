"""Schedules of learning rate, momentum and weight decay, as data and as pure functions of the step.

>>> import schedules
>>> block = {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}}
>>> schedules.trace(block, 4, base={"lr": (0.1,)})["lr"][:, 0].tolist()
[0.0, 0.05, 0.1, 0.1]

Only `ScheduleBinder` and `attach` need torch, which is imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedules.composites import ChainedScheduler, Combined, SequentialLR
from schedules.deepspeed import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR
from schedules.durations import Horizon
from schedules.registry import SCHEDULES, find, from_config, register
from schedules.schedule import Base, Controller, OpenLoop, Schedule, ScheduleError
from schedules.tracing import trace

if TYPE_CHECKING:
    from schedules.binder import ScheduleBinder, attach

__all__ = [
    "SCHEDULES",
    "Base",
    "ChainedScheduler",
    "Combined",
    "Controller",
    "Horizon",
    "LRRangeTest",
    "OneCycle",
    "OpenLoop",
    "Schedule",
    "ScheduleBinder",
    "ScheduleError",
    "SequentialLR",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "attach",
    "find",
    "from_config",
    "register",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in {"ScheduleBinder", "attach"}:
        from schedules import binder

        return getattr(binder, name)
    raise AttributeError(f"module 'schedules' has no attribute {name!r}")

"""Schedules for the learning rate, momentum and weight decay.

A schedule is a dataclass. Its fields are the ``params`` of the ``scheduler`` block in a config.
Most schedules depend only on the step. Feedback schedules also depend on the loss or on a metric.

>>> import schedules
>>> block = {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}}
>>> schedules.trace(block, 4, base={"lr": (0.1,)})["lr"][:, 0].tolist()
[0.0, 0.05, 0.1, 0.1]

Every schedule is an attribute of this package, for example ``schedules.OneCycle``. Names are
imported lazily. Only `ScheduleBinder` and `attach` require torch. Type checkers read the types of
all names from the generated file ``__init__.pyi``.
"""

from __future__ import annotations

import importlib
from typing import Any

from schedules.core.registry import SCHEDULES

_MODULES = {
    "FeedbackSchedule": "schedules.feedback.base",
    "Horizon": "schedules.core.durations",
    "Schedule": "schedules.core.schedule",
    "ScheduleBinder": "schedules.torch_scheduler",
    "ScheduleError": "schedules.core.schedule",
    "attach": "schedules.torch_scheduler",
    "from_config": "schedules.core.registry",
    "plot": "schedules.plots",
    "register": "schedules.core.registry",
    "trace": "schedules.core.trace",
}

__all__ = sorted([*_MODULES, *SCHEDULES, "SCHEDULES", "__version__"])  # noqa: PLE0605  # computed, to avoid a second list


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in SCHEDULES:
        return SCHEDULES[name]
    if name == "__version__":
        from importlib.metadata import version

        return version("onecycle")
    raise AttributeError(f"module 'schedules' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

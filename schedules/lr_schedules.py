"""Drop-in replacements for DeepSpeed's scheduler classes, with the same names and signatures.

To switch a script to these classes, replace the import
``from deepspeed.runtime.lr_schedules import OneCycle`` with
``from schedules.lr_schedules import OneCycle``.

>>> import torch
>>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
>>> OneCycle(optimizer, 0.1, 0.5, cycle_first_step_size=2).get_lr()
[0.1]
"""

from __future__ import annotations

import functools
from typing import Any

from torch.optim import Optimizer

from schedules.core.fields import read_fields
from schedules.core.registry import find
from schedules.torch_scheduler import ScheduleBinder, attach

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

# DeepSpeed's order of positional parameters: `last_batch_iteration` is always last, and
# `total_num_steps` comes before the `warmup_*` parameters.
_ORDER = {
    "WarmupDecayLR": (
        "total_num_steps",
        "warmup_min_lr",
        "warmup_max_lr",
        "warmup_num_steps",
        "warmup_type",
    ),
    "WarmupCosineLR": (
        "total_num_steps",
        "warmup_min_ratio",
        "warmup_num_steps",
        "cos_min_ratio",
        "warmup_type",
    ),
}
_LAST = "last_batch_iteration"
_NOT_IN_DEEPSPEED = ("post_cycle_decay_step_size", "relative")


def _construct(
    type_name: str, optimizer: Optimizer, *positional: Any, **params: Any
) -> ScheduleBinder:
    """Build a schedule by name, attach it to an optimizer, and return the `ScheduleBinder`.

    Raises:
        TypeError: there are too many positional arguments, or an argument is passed both by
            position and by keyword.
        ValueError: a parameter is invalid, or the schedule is incompatible with the optimizer.
    """
    order = _ORDER.get(type_name) or tuple(
        name for name in read_fields(find(type_name)) if name not in (_LAST, *_NOT_IN_DEEPSPEED)
    )
    order = (*order, _LAST)
    named = dict(zip(order, positional, strict=False))
    if len(positional) > len(order) or named.keys() & params.keys():
        raise TypeError(
            f"{type_name}() got too many positional arguments, or multiple values for one "
            f"argument. The arguments after `optimizer` are, in order: {', '.join(order)}. Pass "
            "each argument at most once."
        )
    return attach(type_name, optimizer, **named, **params)


LRRangeTest = functools.partial(_construct, "LRRangeTest")
OneCycle = functools.partial(_construct, "OneCycle")
WarmupCosineLR = functools.partial(_construct, "WarmupCosineLR")
WarmupDecayLR = functools.partial(_construct, "WarmupDecayLR")
WarmupLR = functools.partial(_construct, "WarmupLR")

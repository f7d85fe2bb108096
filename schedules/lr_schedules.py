"""DeepSpeed's scheduler classes by their names and signatures, for scripts that construct them.

``from schedules.lr_schedules import OneCycle`` in place of
``from deepspeed.runtime.lr_schedules import OneCycle`` is all that such a script has to change.

>>> import torch
>>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
>>> OneCycle(optimizer, 0.1, 0.5, cycle_first_step_size=2).get_lr()
[0.1]
"""

from __future__ import annotations

import functools
from typing import Any

from torch.optim import Optimizer

from schedules.core.fields import fields_of
from schedules.core.registry import find
from schedules.torch_scheduler import ScheduleBinder, attach

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

# DeepSpeed's order of positions ends with `last_batch_iteration`, which all have from one base, and
# `warmup_*` parameters stand before `total_num_steps` only by keyword.
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
_OURS = "post_cycle_decay_step_size"  # not in DeepSpeed's signature


def _construct(
    type_name: str, optimizer: Optimizer, *positional: Any, **params: Any
) -> ScheduleBinder:
    """Return the schedule of that name at work on an optimizer.

    Raises:
        TypeError: there are more positions than parameters, or one is given twice.
        ValueError: the parameters make no schedule, or it does not fit the optimizer.
    """
    order = _ORDER.get(type_name) or tuple(
        name for name in fields_of(find(type_name)) if name not in (_LAST, _OURS)
    )
    order = (*order, _LAST)
    named = dict(zip(order, positional, strict=False))
    if len(positional) > len(order) or named.keys() & params.keys():
        raise TypeError(
            f"{type_name}() must get each parameter once, in the order {', '.join(order)}."
        )
    return attach(type_name, optimizer, **named, **params)


LRRangeTest = functools.partial(_construct, "LRRangeTest")
OneCycle = functools.partial(_construct, "OneCycle")
WarmupCosineLR = functools.partial(_construct, "WarmupCosineLR")
WarmupDecayLR = functools.partial(_construct, "WarmupDecayLR")
WarmupLR = functools.partial(_construct, "WarmupLR")

"""Collect and compare the settings that must not change when a run resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from engine.config import Config
from engine.errors import CheckpointError
from schedules import ScheduleBinder

__all__ = [
    "KERNEL_SETTINGS",
    "Identity",
    "build_identity",
    "check_identity",
    "read_hyperparameters",
]

Identity = Mapping[str, Any]

KERNEL_SETTINGS = frozenset({"fused", "foreach", "capturable"})
"""Settings of a param group that may change when a run resumes, because they only select a kernel.

For example, a run on the CPU can load a checkpoint that was saved with ``capturable=True``.
"""

_CONVERTED = "converted"
_GROUP_SETTINGS = ("lr", "momentum", "betas", "weight_decay")
_ADDED = ("param_groups", "loss_scale")
_MAX_LENGTH = 1000  # characters; a tensor with a longer JSON representation is stored as a hash


def build_identity(config: Config, scheduler: object, optimizer: Identity) -> Identity:
    """Return the settings that must match between a run and a checkpoint that it loads.

    Args:
        config: config of the run.
        scheduler: scheduler of the run, with all durations resolved to steps; None if the run has
            no scheduler.
        optimizer: hyperparameters that `read_hyperparameters` returned before the schedule changed
            any of them.
    """
    block, scaling = config.optimizer, config.loss_scaling
    params = json.loads(json.dumps(dict(block.params))) if block else {}
    return {
        "scheduler": scheduler.identity
        if isinstance(scheduler, ScheduleBinder)
        else scheduler and _read_attributes(scheduler),
        "optimizer": {"type": block.type, "params": dict(block.params)} if block else optimizer,
        # The script may set other values in its param groups than the config.
        "param_groups": {
            str(index): {
                name: group[name]
                for name in _GROUP_SETTINGS
                if name in group and group[name] != params.get(name)
            }
            for index, group in enumerate(optimizer["groups"] if block else ())
        },
        "loss_scale": None if scaling is None else scaling.loss_scale,
        "train_batch_size": config.batch.train,
        "world_size": config.batch.data_ranks,
        "precision": config.precision,
    }


def read_hyperparameters(optimizer: Optimizer) -> Identity:
    """Return an optimizer's class name and each param group's hyperparameters, as JSON types.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> read_hyperparameters(torch.optim.SGD([weight], lr=torch.tensor(0.5)))["groups"][0]["lr"]
    0.5
    """
    converted: set[str] = set()
    groups = [
        _to_json({name: value for name, value in group.items() if name != "params"}, converted)
        for group in getattr(optimizer, "param_groups", ())  # missing for inference
    ]
    return {"type": type(optimizer).__name__, "groups": groups, _CONVERTED: sorted(converted)}


def _read_attributes(scheduler: object) -> Identity:
    """Return the class name and the public attributes of a torch or custom scheduler."""
    converted: set[str] = set()
    # Leave out the optimizer, which has its own entry in the identity.
    public = {
        name: value
        for name, value in vars(scheduler).items()
        if not name.startswith("_") and name != "optimizer"
    }
    params = _to_json(public, converted)
    return {"type": type(scheduler).__name__, "params": params, _CONVERTED: sorted(converted)}


def check_identity(checkpoint_dir: Path, saved: Identity, own: Identity) -> None:
    """Check that a checkpoint and this run have the same identity.

    An identity consists of the settings that must not change when a run is resumed.

    Args:
        checkpoint_dir: directory of the checkpoint, for the error message.
        saved: identity in the checkpoint's manifest.
        own: identity of this run.

    Raises:
        CheckpointError: if the identities differ. The message lists the settings that differ.
    """
    # Checkpoints of earlier versions do not contain all settings.
    own = {name: value for name, value in own.items() if name in saved or name not in _ADDED}
    changed = list(_find_differences(saved, json.loads(json.dumps(own))))
    if changed:
        raise CheckpointError(
            f"{checkpoint_dir} does not match this run: {'; '.join(changed)}. Use the values of "
            "the checkpoint, or set `engine.checkpoint.override` to true to resume with the values "
            "of this run. To start a new run, set another `engine.checkpoint.dir`."
        )


def _find_differences(
    saved: Any, own: Any, name: str = "", unknown: Collection[str] = ()
) -> Iterator[str]:
    """Yield a message for each setting that differs between a checkpoint and this run.

    Args:
        saved: value in the checkpoint; may be a mapping or a list of settings.
        own: value at the same path in the identity of this run.
        name: dotted path of the value; empty for the whole identity.
        unknown: keys that are ignored if the checkpoint does not contain them.
    """
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        # Checkpoints of earlier versions do not contain the values that JSON cannot represent, such
        # as a function or a tensor in the scheduler's attributes. Skip these values when resuming
        # from an old checkpoint. All other values must match. The drawback is that the first resume
        # does not detect a changed tensor.
        if _CONVERTED in own and _CONVERTED not in saved:
            unknown = own[_CONVERTED]
        for key in dict.fromkeys([*saved, *own]):
            is_ignored = key == _CONVERTED or key in KERNEL_SETTINGS
            if is_ignored or (key in unknown and key not in saved):
                continue
            below = f"{name}.{key}" if name else key
            values = saved.get(key, "absent"), own.get(key, "absent")
            yield from _find_differences(*values, below, unknown)
    elif isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        for index, values in enumerate(zip(saved, own, strict=True)):
            yield from _find_differences(*values, f"{name}.{index}", unknown)
    elif saved != own:
        yield f"`{name}` is {saved} in the checkpoint but {own} now"


def _to_json(values: Mapping[str, Any], converted: set[str]) -> dict[str, Any]:
    """Return a copy of a mapping with its values converted to JSON types.

    The names of values that JSON cannot represent, such as tensors, are added to ``converted``.
    """
    converted |= {name for name, value in values.items() if not _is_json(value)}
    return {name: _describe(value) for name, value in values.items()}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _describe(value: Any) -> Any:
    """Convert a value to JSON types.

    A tensor or array becomes a number, a list of numbers or, if it is large, a hash. A function or
    class becomes its name. Any other object that JSON cannot represent becomes the name of its
    class.
    """
    try:
        return json.loads(json.dumps(value, default=_describe_object))
    except (TypeError, ValueError):  # invalid keys, or a circular reference
        return type(value).__qualname__


def _describe_object(value: object) -> Any:
    if not isinstance(value, Tensor | np.ndarray | np.generic):
        # Functions and classes have a name; any other object is described by its type.
        return getattr(value, "__qualname__", type(value).__qualname__)
    numbers = value.tolist()
    while isinstance(numbers, list) and len(numbers) == 1:
        numbers = numbers[0]
    text = json.dumps(numbers)
    return numbers if len(text) <= _MAX_LENGTH else hashlib.sha256(text.encode()).hexdigest()

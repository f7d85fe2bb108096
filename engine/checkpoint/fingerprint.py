"""The values that a run must share with the checkpoint that it resumes from."""

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

__all__ = ["Identity", "hyperparameters", "identity_of", "refuse_another_run"]

Identity = Mapping[str, Any]

_CONVERTED = "converted"
_LONGEST = 1000  # characters of a tensor's numbers; a hash represents a larger tensor


def identity_of(config: Config, scheduler: object, optimizer: Identity | None) -> Identity:
    """Return the identity of a run.

    Args:
        config: of the run.
        scheduler: at work, as it was built; its durations are known by now.
        optimizer: the `hyperparameters` of the script's own, where the config has none.
    """
    block = config.optimizer
    return {
        "scheduler": scheduler.identity
        if isinstance(scheduler, ScheduleBinder)
        else scheduler and _attributes(scheduler),
        "optimizer": {"type": block.type, "params": dict(block.params)} if block else optimizer,
        "train_batch_size": config.batch.train,
        "world_size": config.batch.world_size,
        "precision": config.precision,
    }


def hyperparameters(optimizer: Optimizer) -> Identity:
    """Return the type of an optimizer, and the hyperparameters of each param group.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> hyperparameters(torch.optim.SGD([weight], lr=torch.tensor(0.5)))["groups"][0]["lr"]
    0.5
    """
    converted: set[str] = set()
    groups = [
        _to_json({name: value for name, value in group.items() if name != "params"}, converted)
        for group in getattr(optimizer, "param_groups", ())  # what only infers has none
    ]
    return {"type": type(optimizer).__name__, "groups": groups, _CONVERTED: sorted(converted)}


def _attributes(scheduler: object) -> Identity:
    """Return the type and the public attributes of a scheduler that is not ours."""
    converted: set[str] = set()
    # The optimizer has an entry of its own in the identity.
    public = {
        name: value
        for name, value in vars(scheduler).items()
        if not name.startswith("_") and name != "optimizer"
    }
    params = _to_json(public, converted)
    return {"type": type(scheduler).__name__, "params": params, _CONVERTED: sorted(converted)}


def refuse_another_run(place: Path, saved: Identity, own: Identity) -> None:
    """Refuse a checkpoint that does not match this run.

    Raises:
        CheckpointError: it does not match; the message names each value that differs.
    """
    changed = list(_differences(saved, json.loads(json.dumps(own))))
    if changed:
        raise CheckpointError(
            f"{place} must be of a run like this one, but {'; '.join(changed)}. Put back what was "
            'saved, or set "engine": {"checkpoint": {"override": true}} to go on with what is new.'
        )


def _differences(
    saved: Any, own: Any, name: str = "", unknown: Collection[str] = ()
) -> Iterator[str]:
    """Yield a text for each value that differs; ``unknown`` names those that may be absent."""
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        # Versions that did not list converted values dropped them. For such a checkpoint exactly
        # the values that are converted now are unknown; all others must match. Without this, a
        # checkpoint of a run whose scheduler has a function among its attributes could no longer
        # be resumed; the price is that a tensor's change goes unnoticed once, as it did before.
        if _CONVERTED in own and _CONVERTED not in saved:
            unknown = own[_CONVERTED]
        for key in dict.fromkeys([*saved, *own]):
            if key == _CONVERTED or (key in unknown and key not in saved):
                continue
            below = f"{name}.{key}" if name else key
            values = saved.get(key, "absent"), own.get(key, "absent")
            yield from _differences(*values, below, unknown)
    elif isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        for index, values in enumerate(zip(saved, own, strict=True)):
            yield from _differences(*values, f"{name}.{index}", unknown)
    elif saved != own:
        yield f"`{name}` was {saved} and is {own}"


def _to_json(values: Mapping[str, Any], converted: set[str]) -> dict[str, Any]:
    """Return values as JSON carries them, and add the names of those that it cannot carry."""
    converted |= {name for name, value in values.items() if not _is_json(value)}
    return {name: _describe(value) for name, value in values.items()}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _describe(value: Any) -> Any:
    """Return a value as JSON carries it: of a tensor the numbers, of any other object a name."""
    try:
        return json.loads(json.dumps(value, default=_describe_object))
    except (TypeError, ValueError):  # keys that are no text, or a value that contains itself
        return type(value).__qualname__


def _describe_object(value: object) -> Any:
    if not isinstance(value, Tensor | np.ndarray | np.generic):
        # A function has a name of its own; any other object has only its type's.
        return getattr(value, "__qualname__", type(value).__qualname__)
    numbers = value.tolist()
    while isinstance(numbers, list) and len(numbers) == 1:
        numbers = numbers[0]
    text = json.dumps(numbers)
    return numbers if len(text) <= _LONGEST else hashlib.sha256(text.encode()).hexdigest()

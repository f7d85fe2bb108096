"""What a run that goes on must have in common with the one that was saved."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from engine.config import Config
from engine.errors import CheckpointError
from schedules import ScheduleBinder

__all__ = ["Identity", "hyperparameters", "identity_of", "refuse_another_run"]

Identity = Mapping[str, Any]


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
        else scheduler
        and {"type": type(scheduler).__name__, "params": _plain_attributes(scheduler)},
        "optimizer": {"type": block.type, "params": dict(block.params)} if block else optimizer,
        "train_batch_size": config.batch.train,
        "world_size": config.batch.world_size,
        "precision": config.precision,
    }


def hyperparameters(optimizer: Optimizer) -> Identity:
    """Return the type of an optimizer, and of each param group what it was built with.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> hyperparameters(torch.optim.SGD([weight], lr=0.5))["groups"][0]["lr"]
    0.5
    """
    groups = [
        _plain({name: value for name, value in group.items() if name != "params"})
        for group in getattr(optimizer, "param_groups", ())  # what only infers has none
    ]
    return {"type": type(optimizer).__name__, "groups": groups}


def refuse_another_run(place: Path, saved: Identity, own: Identity) -> None:
    """Prove that a checkpoint is of a run like this one.

    Raises:
        CheckpointError: it is not; the message names each value that differs.
    """
    changed = list(_differences(saved, json.loads(json.dumps(own)), ""))
    if changed:
        raise CheckpointError(
            f"{place} must be of a run like this one, but {'; '.join(changed)}. Put back what was "
            'saved, or set "engine": {"checkpoint": {"override": true}} to go on with what is new.'
        )


def _differences(saved: Any, own: Any, name: str) -> Iterator[str]:
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        for key in dict.fromkeys([*saved, *own]):
            below = f"{name}.{key}" if name else key
            yield from _differences(saved.get(key, "absent"), own.get(key, "absent"), below)
    elif saved != own:
        yield f"`{name}` was {saved} and is {own}"


def _plain_attributes(scheduler: object) -> dict[str, Any]:
    public = {name: value for name, value in vars(scheduler).items() if not name.startswith("_")}
    return _plain(public)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON can carry of some values, as it carries it."""
    plain = {}
    for name, value in values.items():
        with contextlib.suppress(TypeError, ValueError):  # a function, a tensor, the optimizer
            plain[name] = json.loads(json.dumps(value))
    return plain

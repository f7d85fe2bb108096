"""``initialize``: proves a config right and puts a model to work by it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset

from engine.backends.base import Backend
from engine.backends.pytorch import PyTorchBackend
from engine.config import Config, Source, load_config
from engine.data import make_loader
from engine.engine import Engine
from engine.optimizers import build_optimizer
from engine.ranks import connect, world_size
from schedules import ScheduleBinder

__all__ = ["initialize"]

log = logging.getLogger("onecycle")

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


def initialize(
    args: argparse.Namespace | None = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | MakeOptimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: LRScheduler | MakeScheduler | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Source | None = None,
) -> tuple[Engine, Optimizer, DataLoader[Any] | None, LRScheduler | None]:
    """Prove a config right, and return a model ready to be trained by it.

    The names and results are those of ``deepspeed.initialize``. Nothing is changed, in the model
    or the optimizer, before everything is proved.

    Args:
        args: a namespace with ``deepspeed_config``, for scripts that give no ``config``; one of
            `add_config_arguments` wins over the config where both speak, and the log says so.
        model: the module to train; it is moved to this rank's device.
        optimizer: one of your own, or a function from parameters to one, in place of the config's.
        model_parameters: parameters or param groups to train; by default all that need gradients.
        training_data: a dataset, for which a loader is returned.
        lr_scheduler: one of your own, or a function from the optimizer to one, in place of the
            config's; it is stepped after each applied update.
        collate_fn: makes a batch of samples, for the returned loader.
        config: path of a ds_config.json, or the config as a dict.

    Returns:
        The engine, the optimizer, the loader (None without ``training_data``) and the schedule
        (None if there is none).

    Raises:
        ConfigError: anything in the config is wrong; ``problems`` holds all of it.
        ValueError: the arguments are at odds with the config, or the optimizer with the schedule.

    >>> import torch, engine
    >>> config = {
    ...     "train_batch_size": 4,
    ...     "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    ...     "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    ... }
    >>> trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    >>> trainer.backward(trainer(torch.ones(4, 2)).mean())
    ... # doctest: +ELLIPSIS
    tensor(...)
    >>> trainer.step(), trainer.get_lr()
    (True, [0.1])
    """
    source = config if config is not None else getattr(args, "deepspeed_config", None)
    if source is None:
        raise ValueError("`config` must be a path or a dict, but is None instead.")
    if model is None:
        raise ValueError("`model` must be a torch.nn.Module, but is None instead.")
    resolved = load_config(source, world_size=world_size(), args=args)
    if resolved.backend.name != "torch":
        raise ValueError(
            f"`engine.backend` must be torch in this version, but is {resolved.backend.name} "
            f"({resolved.backend.reason}); remove what DeepSpeed alone honours."
        )
    _refuse_two_sources(resolved, optimizer, lr_scheduler)
    ranks = connect()
    loader = None
    if training_data is not None:
        loader = make_loader(training_data, resolved, ranks, collate_fn)
    model.to(ranks.device)
    if model_parameters is None:
        model_parameters = (p for p in model.parameters() if p.requires_grad)
    parameters = list(model_parameters)
    if isinstance(optimizer, Optimizer):
        chosen = optimizer
    elif optimizer is not None:
        chosen = optimizer(parameters)
    else:
        assert resolved.optimizer is not None
        chosen = build_optimizer(resolved.optimizer, parameters)
    scheduler: LRScheduler | None = None
    if resolved.schedule is not None:
        per_epoch = len(loader) / resolved.batch.accumulation if _is_sized(loader) else None
        horizon = resolved.horizon(per_epoch)
        scheduler = ScheduleBinder(resolved.schedule, chosen, horizon=horizon)
    elif lr_scheduler is not None:
        scheduler = lr_scheduler if isinstance(lr_scheduler, LRScheduler) else lr_scheduler(chosen)
    backend = PyTorchBackend(model, chosen, resolved, ranks)
    engine = Engine(resolved, backend, scheduler, loader)
    if loader is not None:
        loader.end_with(lambda: engine.run_is_over)
    _announce(engine, backend)
    return engine, chosen, loader, scheduler


def _is_sized(loader: DataLoader[Any] | None) -> TypeGuard[DataLoader[Any]]:
    return loader is not None and not isinstance(loader.dataset, IterableDataset)


def _refuse_two_sources(config: Config, optimizer: object, lr_scheduler: object) -> None:
    for key, in_config, argument in (
        ("optimizer", config.optimizer, optimizer),
        ("scheduler", config.schedule, lr_scheduler),
    ):
        name = "lr_scheduler" if key == "scheduler" else key
        if in_config is not None and argument is not None:
            raise ValueError(
                f"the {key} must have one source, but is given twice: as `{key}` of {config.name} "
                f"({getattr(in_config, 'type', type(in_config).__name__)}) and as the argument "
                f"`{name}` ({type(argument).__name__}). Remove one of them."
            )
    if config.optimizer is None and optimizer is None:
        raise ValueError(
            f"an optimizer must be given, but {config.name} has no `optimizer` and the argument is "
            'None. Add "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}.'
        )


def _announce(engine: Engine, backend: Backend) -> None:
    """Say once, in the log of rank 0, what runs and by what."""
    config = engine.config
    if backend.ranks.rank != 0:
        return
    count = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    if not log.hasHandlers():
        # Nobody configured logging: these few lines are to be seen all the same.
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    for override in config.overrides:
        log.info("%s", override)
    scheduler = engine.lr_scheduler
    schedule = "no schedule"
    if isinstance(scheduler, ScheduleBinder):
        driven = " and ".join(scheduler.schedule.drives)
        schedule = f"{type(scheduler.schedule).__name__} of {config.name} drives {driven}"
    elif scheduler is not None:
        schedule = f"{type(scheduler).__name__} of the script"
    log.info(
        "%s; %s; %s updates %s parameters; %s",
        backend.describe(),
        config.batch,
        type(engine.optimizer).__name__,
        f"{count:,}",
        schedule,
    )

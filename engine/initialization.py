"""``initialize``: validates a config and builds the engine that trains by it."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset

from engine import backends
from engine.backends.base import Backend
from engine.checkpoint.fingerprint import hyperparameters, identity_of
from engine.config import Config, ConfigError, Source, load_config
from engine.distributed.ranks import (
    check_configs_match,
    init_distributed,
    process_rank,
    world_size,
)
from engine.engine import Engine
from engine.range_test.script import apply_sweep, attach_recorder
from engine.range_test.sweep import sweep_of_environment
from engine.training.data import make_loader
from engine.training.monitors import build_monitors
from engine.training.optimizers import OptimizerFactory
from schedules import ScheduleBinder
from schedules.torch_scheduler import bind

__all__ = ["initialize"]

log = logging.getLogger("onecycle")

_AFTER_RANK_0 = 10.0

SchedulerFactory = Callable[[Optimizer], LRScheduler]


def initialize(
    args: argparse.Namespace | None = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: LRScheduler | SchedulerFactory | None = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Source | None = None,
    mesh_param: Any = None,
    config_params: Source | None = None,
    # `Any` in place of None: a caller knows whether it passed data and need not check.
) -> tuple[Engine, Optimizer, DataLoader[Any] | Any, LRScheduler | Any]:
    """Validate a config and return an engine that trains the model by it.

    The arguments, their order and the results are those of ``deepspeed.initialize``. Neither the
    model nor the optimizer is changed before the config is validated.

    Args:
        args: namespace with ``deepspeed_config``, for scripts that pass no ``config``; one of
            `add_config_arguments` wins over the config where both set a value, which is logged.
        model: module to train; it is moved to this rank's device.
        optimizer: your own optimizer, or a function from parameters to one; default: the config's.
        model_parameters: parameters or param groups to train; default: all that need gradients.
        training_data: dataset, for which a loader is returned.
        lr_scheduler: your own scheduler, or a function from the optimizer to one; default: the
            config's. It is stepped after each step that was applied.
        distributed_port: port of rank 0, if the environment sets none.
        mpu: model-parallelism unit; DeepSpeed backend only.
        dist_init_required: accepted for compatibility. An initialized process group is used; one
            is created if it is needed.
        collate_fn: function from a list of samples to a batch, for the returned loader.
        config: path of a ds_config.json, or the config as a dict.
        mesh_param: shape of the device mesh; DeepSpeed backend only.
        config_params: old name of ``config``.

    Returns:
        The engine, the optimizer, the loader (None without ``training_data``) and the schedule
        (None without one).

    Raises:
        ConfigError: the config is invalid; ``problems`` holds every problem.
        ValueError: the arguments do not match the config, the optimizer does not match the
            schedule, or the ranks have different configs.
        ImportError: the config needs DeepSpeed, which is not installed.

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
    del dist_init_required
    if model is None:
        raise ValueError("`model` must be a torch.nn.Module, but is None instead.")
    sweep = sweep_of_environment()
    source = sweep.config if sweep is not None else None
    resolved = _load(source or _choose_source(args, config, config_params), args)
    if sweep is not None:
        resolved, lr_scheduler = apply_sweep(resolved, sweep), None
    _check_sources(resolved, optimizer, lr_scheduler)
    is_deepspeed = resolved.backend.name == "deepspeed"
    ranks = init_distributed(always_create_group=is_deepspeed, port=distributed_port)
    check_configs_match(ranks, json.dumps(resolved.own, sort_keys=True))
    loader = None
    if training_data is not None:
        loader = make_loader(training_data, resolved, ranks, collate_fn)
    backend = backends.build(
        model,
        optimizer,
        resolved,
        ranks,
        parameters=model_parameters,
        mpu=mpu,
        mesh_param=mesh_param,
    )
    # A schedule changes the param groups, so the user's optimizer is described before it is bound.
    of_script = None if resolved.optimizer else hyperparameters(backend.basic_optimizer)
    scheduler = _bind_schedule(resolved, lr_scheduler, backend.optimizer, loader)
    identity = identity_of(resolved, scheduler, of_script)
    monitors = build_monitors(resolved.monitors, ranks)
    engine = Engine(resolved, backend, scheduler, loader, identity, monitors)
    if loader is not None:
        loader.end_with(lambda: engine.run_is_over)
    attach_recorder(engine, sweep)
    if ranks.rank == 0:
        _announce(engine, backend)
    engine._resume()  # noqa: SLF001  # private to the package
    return engine, backend.optimizer, loader, scheduler


def _choose_source(args: argparse.Namespace | None, *configs: Source | None) -> Source:
    given = [config for config in (*configs, getattr(args, "deepspeed_config", None)) if config]
    if not given:
        raise ValueError("`config` must be a path or a dict, but is None instead.")
    if len(given) > 1:
        raise ValueError(f"`config` must be given once, but is given as {given} instead.")
    return given[0]


def _load(source: Source, args: argparse.Namespace | None) -> Config:
    """Load and validate a config; report its problems on rank 0 only."""
    try:
        return load_config(source, world_size=world_size(), args=args)
    except ConfigError as error:
        rank = process_rank()
        if rank == 0:
            raise
        time.sleep(_AFTER_RANK_0)  # rank 0's error ends the job before this one is printed
        raise SystemExit(
            f"rank {rank} refuses the config; if rank 0 does not, their files differ: {error}"
        ) from None


def _check_sources(config: Config, optimizer: object, lr_scheduler: object) -> None:
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
    nothing_trains = config.optimizer is None and optimizer is None
    if nothing_trains and config.backend.name != "deepspeed":  # an engine for inference needs none
        raise ValueError(
            f"an optimizer must be given, but {config.name} has no `optimizer` and the argument is "
            'None. Add "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}.'
        )


def _bind_schedule(
    config: Config,
    given: LRScheduler | SchedulerFactory | None,
    optimizer: Optimizer,
    loader: DataLoader[Any] | None,
) -> LRScheduler | None:
    if config.schedule is not None:
        per_epoch = None
        if loader is not None and not isinstance(loader.dataset, IterableDataset):
            per_epoch = len(loader) / config.batch.accumulation
        return bind(config.schedule, optimizer, horizon=config.horizon(per_epoch))
    if given is None or isinstance(given, LRScheduler) or not callable(given):
        return given  # not necessarily a subclass of torch's
    return given(optimizer)


def _announce(engine: Engine, backend: Backend) -> None:
    """Log the training setup, the config's warnings and its overrides."""
    _show_log()
    config = engine.config
    for override in config.overrides:
        log.info("%s", override)
    for problem in config.warnings:
        log.warning("%s: %s", config.name, problem)
    norm = config.gradient_clipping
    log.info(
        "%s (%s); %s; %s updates %s parameters%s; %s",
        backend.describe(),
        config.backend.reason,
        config.batch,
        type(backend.basic_optimizer).__name__,
        f"{backend.trained:,}",
        f", gradients clipped at norm {norm:g}" if norm else "",
        _describe_schedule(engine.lr_scheduler, config.name),
    )


def _show_log() -> None:
    """Make info lines visible even if the script does not configure logging.

    A level that the script has set on this logger by its name stays.
    """
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


def _describe_schedule(scheduler: LRScheduler | None, config_name: str) -> str:
    if isinstance(scheduler, ScheduleBinder):
        schedule = scheduler.schedule
        return f"{type(schedule).__name__} of {config_name} drives {' and '.join(schedule.drives)}"
    return "no schedule" if scheduler is None else f"{type(scheduler).__name__} of the script"

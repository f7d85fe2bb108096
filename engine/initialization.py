"""``initialize``: proves a config right and puts a model to work by it."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset

from engine.backends.base import Backend
from engine.backends.pytorch import PyTorchBackend
from engine.checkpoint.fingerprint import hyperparameters, identity_of
from engine.config import Config, ConfigError, Source, load_config
from engine.distributed.ranks import Ranks, agree, connect, process_rank, world_size
from engine.engine import Engine
from engine.range_test.suggestion import MIN_POINTS
from engine.range_test.sweep import RECORD, Recorder, Sweep, sweep_of_environment
from engine.training.activation_checkpointing import blocks_of, recompute
from engine.training.data import make_loader
from engine.training.monitors import monitors_of
from engine.training.optimizers import build_optimizer
from schedules import (
    LRRangeTest,
    ScheduleBinder,
    bind,
    from_config,
)

__all__ = ["initialize"]

log = logging.getLogger("onecycle")

_AFTER_RANK_0 = 10.0

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


def initialize(
    args: argparse.Namespace | None = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | MakeOptimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: LRScheduler | MakeScheduler | None = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Source | None = None,
    mesh_param: Any = None,
    config_params: Source | None = None,
) -> tuple[Engine, Optimizer, DataLoader[Any] | None, LRScheduler | None]:
    """Prove a config right, and return a model ready to be trained by it.

    The names, their order and the results are those of ``deepspeed.initialize``. Nothing is
    changed, in the model or the optimizer, before the config is proved.

    Args:
        args: a namespace with ``deepspeed_config``, for scripts that give no ``config``; one of
            `add_config_arguments` wins over the config where both speak, and the log says so.
        model: the module to train; it is moved to this rank's device.
        optimizer: one of your own, or a function from parameters to one, in place of the config's.
        model_parameters: parameters or param groups to train; by default all that need gradients.
        training_data: a dataset, for which a loader is returned.
        lr_scheduler: one of your own, or a function from the optimizer to one, in place of the
            config's; it is stepped after each applied update.
        distributed_port: port of rank 0, where the environment names none.
        mpu: for the DeepSpeed backend alone, a model-parallelism unit.
        dist_init_required: accepted as DeepSpeed does; a process group that is up is used, and one
            that is needed is made.
        collate_fn: makes a batch of samples, for the returned loader.
        config: path of a ds_config.json, or the config as a dict.
        mesh_param: for the DeepSpeed backend alone, the shape of its device mesh.
        config_params: the old name of ``config``.

    Returns:
        The engine, the optimizer, the loader (None without ``training_data``) and the schedule
        (None if there is none).

    Raises:
        ConfigError: anything in the config is wrong; ``problems`` holds all of it.
        ValueError: the arguments are at odds with the config, the optimizer with the schedule, or
            the ranks with one another.
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
    if sweep is not None:
        lr_scheduler = None
    own = sweep.config if sweep is not None else None
    source = own or _source(args, config, config_params)
    with _told_by_rank_0():
        resolved = load_config(source, world_size=world_size(), args=args)
    if sweep is not None:
        resolved = _under_test(resolved, sweep)
    _refuse_two_sources(resolved, optimizer, lr_scheduler)
    model_parameters = _listed(model_parameters)
    deepspeed = resolved.backend.name == "deepspeed"
    if not deepspeed:
        _refuse_what_torch_lacks(mpu=mpu, mesh_param=mesh_param)
    ranks = connect(alone=deepspeed, port=distributed_port)
    agree(ranks, json.dumps(resolved.own, sort_keys=True))
    loader = None
    if training_data is not None:
        loader = make_loader(training_data, resolved, ranks, collate_fn)
    backend: Backend
    if deepspeed:
        from engine.backends.deepspeed import DeepSpeedBackend

        doors = {"mpu": mpu, "mesh_param": mesh_param}
        backend = DeepSpeedBackend(model, optimizer, model_parameters, resolved, ranks, doors)
    else:
        backend = _on_torch(model, optimizer, model_parameters, resolved, ranks)
    of_script = None if resolved.optimizer else hyperparameters(backend.basic_optimizer)
    scheduler = _scheduler(resolved, lr_scheduler, backend.optimizer, loader)
    identity = identity_of(resolved, scheduler, of_script)
    monitors = monitors_of(resolved.monitors, ranks)
    engine = Engine(resolved, backend, scheduler, loader, identity, monitors)
    if loader is not None:
        loader.end_with(lambda: engine.run_is_over)
    if sweep is not None or isinstance(resolved.schedule, LRRangeTest):
        _record(engine, sweep)
    _announce(engine, backend)
    engine.resume()
    return engine, backend.optimizer, loader, scheduler


@contextlib.contextmanager
def _told_by_rank_0() -> Iterator[None]:
    """Have what is wrong with a config said once, not once by every rank."""
    try:
        yield
    except ConfigError as error:
        rank = process_rank()
        if rank == 0:
            raise
        time.sleep(_AFTER_RANK_0)  # which ends the job, before this is said
        raise SystemExit(
            f"rank {rank} refuses the config; if rank 0 does not, their files differ: {error}"
        ) from None


def _listed(parameters: Iterable[Any] | None) -> list[Any] | None:
    """Return parameters, or groups of them, as lists: a generator can be read once only."""
    if parameters is None:
        return None
    return [
        {**each, "params": _members(each["params"])} if isinstance(each, dict) else each
        for each in parameters
    ]


def _members(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _under_test(config: Config, sweep: Sweep) -> Config:
    """Return the config of a script that `onecycle lr-test` runs."""
    changed = config.rehearsal(from_config(sweep.scheduler))
    if sweep.seed_offset:
        torch.manual_seed(torch.initial_seed() + sweep.seed_offset)
    return replace(changed, seed=config.seed + sweep.seed_offset)


def _record(engine: Engine, sweep: Sweep | None) -> None:
    """Have a range test noted: one of `onecycle lr-test`, or the config's own, to its very end."""
    first = engine.global_rank == 0
    if sweep is None:
        recorder = Recorder(None, math.inf)
        engine.record(recorder, rehearses=False)
        if first:
            atexit.register(_report, recorder, Path(engine.config.report or "lr_test"))
        return
    facts = {
        "backend": engine.config.backend.name,
        "world_size": engine.world_size,
        "precision": engine.config.precision,
        "train_batch_size": engine.train_batch_size(),
    }
    path = Path(sweep.folder) / RECORD if sweep.folder and first else None
    engine.record(Recorder(sweep.steps, sweep.divergence, path, facts), rehearses=True)


def _report(recorder: Recorder, folder: Path) -> None:
    from engine.range_test.report import LRRangeReport

    if len(recorder.run.curve[0]) >= MIN_POINTS:
        report = LRRangeReport((recorder.run,))
        picture, _ = report.write(folder)
        found = report.suggestion
        verdict = f"cycle_max_lr {found.max_lr:.2g}" if found.max_lr else f"none: {found.reason}"
        log.info("LR range test: %s; %s", verdict, picture)


def _source(args: argparse.Namespace | None, *configs: Source | None) -> Source:
    given = [config for config in (*configs, getattr(args, "deepspeed_config", None)) if config]
    if not given:
        raise ValueError("`config` must be a path or a dict, but is None instead.")
    if len(given) > 1:
        raise ValueError(f"`config` must be given once, but is given as {given} instead.")
    return given[0]


def _refuse_what_torch_lacks(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be None on the PyTorch backend, which has no model parallelism, "
                f'but is {value!r} instead; set "engine": {{"backend": "deepspeed"}}.'
            )


def _on_torch(
    model: nn.Module,
    optimizer: Optimizer | MakeOptimizer | None,
    model_parameters: Iterable[Any] | None,
    config: Config,
    ranks: Ranks,
) -> Backend:
    model.to(ranks.device)
    if config.recomputes is not None:
        _recompute(model, config)
    if config.compiles is not None:
        known = torch.compiler.list_backends(exclude_tags=())
        if config.compiles not in known:
            raise ValueError(
                f"`engine.compile` must be one of {', '.join(known)}, but is {config.compiles!r}."
            )
        model.compile(backend=config.compiles)
    divides = config.zero_stage > 0 and ranks.world_size > 1
    parameters: list[Any]
    if divides:
        from engine.backends.fsdp import ShardedBackend, shard

        if isinstance(optimizer, Optimizer):
            # Its parameters are about to become parts of themselves.
            groups = shard(model, config, optimizer.param_groups)
            for group, divided in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = divided["params"]
            return ShardedBackend(model, optimizer, config, ranks)
        parameters = shard(model, config, model_parameters)
        return ShardedBackend(model, _made(optimizer, config, parameters), config, ranks)
    if isinstance(optimizer, Optimizer):
        _refuse_strange_parameters(model, optimizer)
        return PyTorchBackend(model, optimizer, config, ranks)
    if model_parameters is None:
        model_parameters = (p for p in model.parameters() if p.requires_grad)
    chosen = _made(optimizer, config, list(model_parameters))
    return PyTorchBackend(model, chosen, config, ranks)


def _scheduler(
    config: Config,
    given: LRScheduler | MakeScheduler | None,
    optimizer: Optimizer,
    loader: DataLoader[Any] | None,
) -> LRScheduler | None:
    if config.schedule is not None:
        per_epoch = len(loader) / config.batch.accumulation if _is_sized(loader) else None
        return bind(config.schedule, optimizer, horizon=config.horizon(per_epoch))
    if given is None or isinstance(given, LRScheduler) or not callable(given):
        return given  # it need not be one of torch
    return given(optimizer)


def _recompute(model: nn.Module, config: Config) -> None:
    blocks = blocks_of(model, config.wrap)
    if not blocks:
        raise ValueError(
            "`activation_checkpointing` must have blocks to compute again, but the model has no "
            'list of modules of one class; name their classes in "engine": {"wrap": […]}.'
        )
    recompute(blocks, on_host=config.recomputes == "host")


def _made(optimizer: MakeOptimizer | None, config: Config, parameters: list[Any]) -> Optimizer:
    if optimizer is not None:
        return optimizer(parameters)
    assert config.optimizer is not None
    return build_optimizer(config.optimizer, parameters)


def _refuse_strange_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(parameter) in own for parameter in trained):
        raise ValueError(
            "`optimizer` must train parameters of `model`, but has none of them; build it from "
            "`model.parameters()` after the model is on its device."
        )


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
    nothing_trains = config.optimizer is None and optimizer is None
    if nothing_trains and config.backend.name != "deepspeed":  # which also only infers
        raise ValueError(
            f"an optimizer must be given, but {config.name} has no `optimizer` and the argument is "
            'None. Add "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}.'
        )


def _announce(engine: Engine, backend: Backend) -> None:
    """Say once, in the log of rank 0, what runs and by what."""
    config = engine.config
    if backend.ranks.rank != 0:
        return
    # These few lines are to be seen, whether or not the script has configured logging, unless it
    # has asked for less of this logger by its name.
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    for override in config.overrides:
        log.info("%s", override)
    for problem in config.warnings:
        log.warning("%s: %s", config.name, problem)
    scheduler = engine.lr_scheduler
    schedule = "no schedule"
    if isinstance(scheduler, ScheduleBinder):
        driven = " and ".join(scheduler.schedule.drives)
        schedule = f"{type(scheduler.schedule).__name__} of {config.name} drives {driven}"
    elif scheduler is not None:
        schedule = f"{type(scheduler).__name__} of the script"
    norm = config.gradient_clipping
    log.info(
        "%s (%s); %s; %s updates %s parameters%s; %s",
        backend.describe(),
        config.backend.reason,
        config.batch,
        type(backend.basic_optimizer).__name__,
        f"{backend.trained:,}",
        f", gradients clipped at norm {norm:g}" if norm else "",
        schedule,
    )

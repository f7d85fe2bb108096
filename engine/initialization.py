"""The function `initialize`, which builds the training engine."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset

from engine import backends
from engine.backends.base import Backend
from engine.backends.deepspeed_data import (
    connect_loader,
    is_curriculum_enabled,
    share_deepspeed_io,
)
from engine.backends.deepspeed_import import suspend_zero_init
from engine.checkpoint.fingerprint import build_identity, read_hyperparameters
from engine.config import Config, ConfigError, Source, load_config
from engine.config.batch_sizes import DataRanks, count_data_ranks
from engine.config.resolve import drop_group_schedules
from engine.config.schedule_context import END_HINT, EvaluatedSchedule
from engine.display.param_groups import GroupRow
from engine.distributed.environment import SET
from engine.distributed.ranks import (
    Ranks,
    check_configs_match,
    get_rank,
    get_world_size,
    init_distributed,
)
from engine.engine import Engine
from engine.errors import escape
from engine.range_test.script import (
    apply_sweep,
    attach_recorder,
    is_next_engine_swept,
    spread_sweep,
)
from engine.range_test.sweep import read_sweep
from engine.run.training_run import TrainingRun
from engine.training.arguments import (
    check_arguments,
    check_is_trainable,
    check_needs_no_closure,
)
from engine.training.compiled_models import unwrap_compiled
from engine.training.data import build_loader, count_steps_per_epoch
from engine.training.diagnostics import attach_diagnostics
from engine.training.loader import RunLoader
from engine.training.monitors import build_monitors
from engine.training.optimizers import (
    OptimizerFactory,
    check_modes,
    has_no_optimizer,
    set_optimizer_mode,
)
from engine.training.param_groups import divide_parameters
from engine.training.setup_log import enable_logging, log_setup
from schedules import Schedule, ScheduleBinder
from schedules.families.per_group import PerGroup
from schedules.torch_scheduler import bind

__all__ = ["initialize"]

log = logging.getLogger("onecycle")

_RANK_0_GRACE_SECONDS = 1.0

SchedulerFactory = Callable[[Optimizer], LRScheduler]


@suspend_zero_init()
def initialize(
    args: argparse.Namespace | None = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | Iterable[Any] | None = None,
    lr_scheduler: LRScheduler | SchedulerFactory | None = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Source | None = None,
    mesh_param: Any = None,
    config_params: Source | None = None,
    # The return type uses `Any` for results that may be None, so that callers can skip None checks.
) -> tuple[Engine, Optimizer, DataLoader[Any] | Any, LRScheduler | Any]:
    """Validate a config and build the engine that trains the model.

    The function has the same arguments and return values as ``deepspeed.initialize``, in the same
    order. An invalid config leaves the model and the optimizer unchanged. Imports of custom
    classes, such as ``"my_module:MySchedule"``, are logged, and so are config values set with the
    option ``--set`` of `onecycle launch` or `onecycle lr-test`.

    Args:
        args: parsed command line; ``args.deepspeed_config`` is used if ``config`` is not passed.
            A dict is accepted, but not read. Options added by `add_schedule_arguments` override the
            config; each override is logged.
        model: module to train; it is moved to this rank's device.
        optimizer: your own optimizer, or a function that takes the parameters and returns an
            optimizer; default: the optimizer in the config. Without an optimizer, the engine can
            run the model, but not train it.
        model_parameters: parameters or param groups to train; by default, all parameters that
            require gradients.
        training_data: dataset for the returned data loader, or your own data loader, which is
            prepared as in `Engine.prepare`.
        lr_scheduler: your own scheduler, or a function that takes the optimizer and returns a
            scheduler; default: the scheduler in the config. The engine steps the scheduler after
            each applied optimizer step.
        distributed_port: port of rank 0, used if the environment does not set ``MASTER_PORT``.
        mpu: model-parallel unit; DeepSpeed backend only.
        dist_init_required: ignored; accepted for compatibility with DeepSpeed. A process group is
            created only if needed.
        collate_fn: function that turns a list of samples into a batch, for the returned loader.
        config: path of a ds_config.json, or the config as a dict.
        mesh_param: shape of the device mesh; DeepSpeed backend only.
        config_params: alias of ``config``, for compatibility with DeepSpeed.

    Returns:
        A tuple of the engine, optimizer, data loader and scheduler. The data loader is None without
        ``training_data``. The scheduler is None if neither the config nor ``lr_scheduler``
        specifies one.

    Raises:
        ConfigError: the config is invalid; ``problems`` lists every problem.
        ValueError: an argument has the wrong type, there is a schedule but no optimizer, the
            schedule cannot run with the optimizer, no parameter of the model requires gradients,
            or the ranks have different configs.
        ImportError: the config requires DeepSpeed, but DeepSpeed is not installed.

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
    enable_logging()
    check_arguments(args, model, optimizer, training_data, lr_scheduler)
    assert model is not None
    model = unwrap_compiled(model)
    lr_test = read_sweep()
    sweep = lr_test if lr_test is not None and is_next_engine_swept(lr_test) else None
    need = backends.find_deepspeed_need(model, mpu=mpu, mesh_param=mesh_param)
    shard = backends.find_data_shard(model, mpu, mesh_param) if need else None
    chosen = (sweep and sweep.config) or _choose_source(args, config, config_params)
    resolved = _load(chosen, args, need, shard)
    if sweep is not None:
        resolved, lr_scheduler = apply_sweep(resolved, sweep), None
    elif lr_test is not None:
        resolved = resolved.copy_for_trial_run(resolved.schedule)
    resolved, replacements = _prefer_arguments(resolved, optimizer, lr_scheduler)
    if model_parameters is None and (resolved.optimizer or callable(optimizer)):
        check_is_trainable(model)
    is_deepspeed = resolved.backend.name == "deepspeed"
    ranks = init_distributed(
        always_create_group=is_deepspeed, port=distributed_port, device=resolved.model.device
    )
    check_configs_match(ranks, json.dumps(resolved.raw, sort_keys=True))
    ranks = _assign_shard(ranks, resolved, shard)
    loader = _build_loader(training_data, resolved, ranks, collate_fn)
    parameters, param_groups = divide_parameters(model, resolved, model_parameters)
    backend = backends.build(
        model,
        optimizer,
        resolved,
        ranks,
        parameters=parameters,
        mpu=mpu,
        mesh_param=mesh_param,
    )
    loader = connect_loader(loader, training_data, resolved, backend, collate_fn)
    check_needs_no_closure(backend.basic_optimizer)
    check_modes(backend.basic_optimizer, backend.optimizer)
    # Binding a schedule changes the param groups, so first read their hyperparameters.
    settings = read_hyperparameters(backend.basic_optimizer)
    if sweep is not None:
        resolved = spread_sweep(resolved, sweep, backend.basic_optimizer)
    schedule = _choose_schedule(resolved, param_groups, backend)
    scheduler = _bind_schedule(resolved, schedule, lr_scheduler, backend, loader)
    identity = build_identity(resolved, scheduler, settings)
    monitors = build_monitors(resolved, ranks)
    engine = Engine(resolved, backend, scheduler, loader, identity, monitors)
    share_deepspeed_io(engine, resolved, backend)
    engine._run.is_trial = lr_test is not None  # noqa: SLF001  # private to the package
    if sweep is not None or lr_test is None:
        attach_recorder(engine, sweep)
    if ranks.rank == 0:
        how, precision = backend.describe()
        monitors.note_setup(
            log_setup(
                resolved,
                backend=how,
                device=str(ranks.device),
                precision=precision,
                optimizer=_get_name(backend.basic_optimizer),
                num_parameters=backend.num_parameters,
                scheduler=scheduler,
                replacements=replacements,
                param_groups=param_groups,
            )
        )
        _warn_of_data(training_data, resolved, engine._run)  # noqa: SLF001  # private to the package
    run = engine._run  # noqa: SLF001  # private to the package
    engine._automatic.resume(run)  # noqa: SLF001  # private to the package
    set_optimizer_mode(backend.basic_optimizer, training=True)
    attach_diagnostics(resolved, backend, run.progress, lambda: run.latest)
    return engine, engine.optimizer, loader, scheduler


def _get_name(optimizer: Optimizer) -> str | None:
    return None if has_no_optimizer(optimizer) else type(optimizer).__name__


def _assign_shard(ranks: Ranks, config: Config, shard: tuple[int, int] | None) -> Ranks:
    """Set the part of the data that this rank processes, if several ranks share a model."""
    data_ranks = config.batch.data_ranks
    if data_ranks == ranks.world_size:
        return ranks
    per_model = ranks.world_size // data_ranks
    return replace(ranks, shard=shard or (ranks.rank // per_model, data_ranks))


def _build_loader(
    training_data: Any,
    config: Config,
    ranks: Ranks,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> RunLoader | None:
    """Build the data loader, unless there is no data or DeepSpeed builds the loader later."""
    if training_data is None or is_curriculum_enabled(config):
        return None
    return build_loader(training_data, config, ranks, collate_fn)


def _choose_source(args: argparse.Namespace | None, *configs: Source | None) -> Source:
    candidates = (*configs, getattr(args, "deepspeed_config", None))
    given = [config for config in candidates if config not in (None, "")]
    if not given and isinstance(args, dict):
        raise ValueError(
            "`config` must be a path or a dict, got None. `args`, the first argument, is a parsed "
            "command line, not the config. Pass the arguments by name, as in "
            "`initialize(model=model, config=config)`."
        )
    if not given:
        raise ValueError(
            "`config` must be a path or a dict, got None. Pass the path of your ds_config.json."
        )
    if len(given) > 1:
        raise ValueError(
            f"More than one config was passed: {given}. Pass only one of `config`, `config_params` "
            "and `args.deepspeed_config`."
        )
    return given[0]


def _load(
    source: Source,
    args: argparse.Namespace | None,
    needs_deepspeed: str | None,
    shard: tuple[int, int] | None,
) -> Config:
    """Return the validated config. If the config is invalid, only rank 0 reports the problems."""

    def count_ranks(config: Mapping[str, Any], world_size: int) -> DataRanks:
        if shard is not None:
            return DataRanks(shard[1], unit="data-parallel rank")
        return count_data_ranks(config, world_size)

    try:
        return load_config(
            source,
            world_size=get_world_size(),
            args=args,
            assignments=json.loads(os.environ.get(SET, "[]")),
            needs_deepspeed=needs_deepspeed,
            count_ranks=count_ranks,
        )
    except ConfigError as error:
        rank = get_rank()
        if rank == 0:
            raise
        # Rank 0's error usually ends the job during this wait, so the problems are printed only
        # once.
        time.sleep(_RANK_0_GRACE_SECONDS)
        keys = ", ".join(f"`{problem.pointer}`" for problem in error.problems[:3])
        message = (
            f"{error.name} is invalid on rank {rank} (at {keys}). Fix the problems that rank 0 "
            "reports; if it reports none, pass the same config on every rank."
        )
        raise ConfigError(error.name, error.problems, escape(message)) from None


def _prefer_arguments(
    config: Config, optimizer: object, lr_scheduler: object
) -> tuple[Config, list[str]]:
    """Drop the config's optimizer or schedules if arguments replace them.

    Returns:
        The resulting config, and a log message about each replacement.

    Raises:
        ValueError: no optimizer is specified although the config or an argument requires one, or
            the argument ``optimizer`` replaces a config optimizer that defines param groups.
    """
    if optimizer is None and config.optimizer is None:
        _check_inference(config, lr_scheduler)
    lines = []
    if optimizer is not None and config.optimizer is not None:
        if keys := config.optimizer.group_keys:
            raise ValueError(
                f"`{keys[0]}` in {config.name} applies only to the config's optimizer, which the "
                "argument `optimizer` replaces. Remove the key or the argument."
            )
        lines.append(
            _describe_replacement("optimizer", optimizer, f"`optimizer` ({config.optimizer.type})")
        )
        config = replace(config, optimizer=None)
    own: tuple[Schedule[Any], ...] = () if config.schedule is None else (config.schedule,)
    if config.optimizer is not None:
        own = (*own, *config.optimizer.group_schedules.values())
    if lr_scheduler is not None and own:
        names = ", ".join(schedule.type_name for schedule in own)
        lines.append(_describe_replacement("lr_scheduler", lr_scheduler, f"`scheduler` ({names})"))
        config = drop_group_schedules(replace(config, schedule=None))
    return config, lines


def _check_inference(config: Config, lr_scheduler: object) -> None:
    """Raise an error if a run without an optimizer has a schedule or ZeRO stage that needs one."""
    need = None
    if config.schedule is not None or lr_scheduler is not None:
        need = f"{config.name} has a schedule" if config.schedule else "`lr_scheduler` is passed"
    elif config.backend.name == "deepspeed" and config.zero_stage in {1, 2}:
        need = f"DeepSpeed's ZeRO stage {config.zero_stage} requires one (stages 0 and 3 do not)"
    if need:
        raise ValueError(
            f"No optimizer is specified, but {need}. Pass the argument `optimizer`, or add "
            '"optimizer": {"type": "AdamW", "params": {"lr": 0.001}} to the config.'
        )


def _describe_replacement(argument: str, given: object, replaced: str) -> str:
    name = getattr(given, "__name__", type(given).__name__)  # a function or a class has a name
    return f"the argument `{argument}` ({name}) replaces the config's {replaced}"


def _bind_schedule(
    config: Config,
    schedule: Schedule[Any] | None,
    given: LRScheduler | SchedulerFactory | None,
    backend: Backend,
    loader: RunLoader | None,
) -> LRScheduler | None:
    if schedule is not None:
        horizon = config.horizon(count_steps_per_epoch(loader, config, backend.ranks))
        return bind(schedule, backend.optimizer, horizon=horizon)
    if given is None or isinstance(given, LRScheduler) or not callable(given):
        return given  # a custom scheduler may not derive from torch's class
    return given(backend.basic_optimizer)  # torch's schedulers reject DeepSpeed's wrappers


def _choose_schedule(
    config: Config, groups: Sequence[GroupRow], backend: Backend
) -> Schedule[Any] | None:
    """Return the config's schedule, or None if the config has no schedule.

    If param groups have their own schedules, return a `PerGroup` with one schedule per group.
    """
    if config.optimizer is None or not config.optimizer.group_schedules:
        return config.schedule
    entries = [group.entry for group in groups]
    if len(entries) != len(backend.optimizer.param_groups):
        raise ValueError(
            "The groups in `optimizer.param_groups` must not set `scheduler` if the model has "
            "DeepSpeed MoE layers, because DeepSpeed splits the param groups of such a model. "
            "Remove `scheduler` from the groups."
        )
    own = config.optimizer.group_schedules
    return PerGroup(
        schedulers=tuple(
            config.schedule if entry is None else own.get(entry, config.schedule)
            for entry in entries
        )
    )


def _warn_of_data(training_data: object, config: Config, run: TrainingRun) -> None:
    """Log the warnings that depend on the size of the training data.

    The size is unknown when the config is validated.
    """
    _warn_of_repeated_samples(training_data, config)
    _warn_of_schedule_end(run, config)


def _warn_of_repeated_samples(training_data: object, config: Config) -> None:
    """Warn if the dataset is smaller than a batch, because each batch then repeats samples."""
    if not isinstance(training_data, Dataset) or isinstance(training_data, IterableDataset):
        return
    samples = len(training_data)  # type: ignore[arg-type]  # Dataset does not declare __len__
    if samples < config.batch.train:
        log.warning(
            "`len(training_data)` (%d) is smaller than `train_batch_size` (%d), so each batch "
            "repeats samples; reduce `train_batch_size`",
            samples,
            config.batch.train,
        )


def _warn_of_schedule_end(run: TrainingRun, config: Config) -> None:
    """Log a warning if the schedule ends much later or earlier than the run.

    If this does not depend on the length of an epoch, the warnings of the config contain it.
    """
    scheduler = run.scheduler
    is_reported = any(problem.rule == "end-of-schedule" for problem in config.warnings)
    steps_per_epoch = run.length.steps_per_epoch
    if is_reported or steps_per_epoch is None or not isinstance(scheduler, ScheduleBinder):
        return
    curves = getattr(scheduler.controller, "curves", {})  # a schedule with feedback has none
    horizon = config.horizon(steps_per_epoch)
    schedule = scheduler.schedule
    evaluated = EvaluatedSchedule(schedule, schedule.resolve(horizon), horizon, {}, curves)
    mismatch = evaluated.find_end_mismatch()
    if mismatch is not None and mismatch.is_harmful:
        log.warning("%s %s", mismatch.describe(in_steps=True), END_HINT)

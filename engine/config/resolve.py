"""Validate a config, and fill in its defaults and derived values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import schemas
from engine.config.backend_choice import BackendChoice, find_offload_device, zero_stage
from engine.config.batch_sizes import (
    BATCH_KEYS,
    BatchSizes,
    RankCounter,
    count_data_ranks,
    derive_batch_sizes,
)
from engine.config.optimizer_block import OptimizerBlock, build_optimizer_block
from engine.config.pointers import dotted_name
from engine.config.rules import RuleContext
from engine.config.schedule_context import build_horizon
from engine.config.schema import (
    SCHEMA,
    add_defaults,
)
from engine.config.source import Source, find_unserializable, load_document
from engine.config.validate import examine
from engine.errors import ConfigError, Problem
from schedules import Horizon, Schedule

if TYPE_CHECKING:
    import argparse

    from engine.config.overrides import Override

__all__ = [
    "BestSettings",
    "CheckpointPlan",
    "Config",
    "LossScaling",
    "drop_group_schedules",
    "load_config",
]


@dataclass(frozen=True)
class LossScaling:
    """The loss-scaling settings of the ``fp16`` section. The field names are the config keys."""

    loss_scale: float
    initial_scale_power: int
    loss_scale_window: int
    hysteresis: int
    consecutive_hysteresis: bool
    min_loss_scale: int


_LOSS_SCALING = tuple(each.name for each in fields(LossScaling))
_RUN = (
    "max_duration",
    "scale_schedule_ratio",
    "scale_warmup",
    "steps_this_run",
    "tokens_per_sample",
)


@dataclass(frozen=True)
class BestSettings:
    """The settings of the ``engine.checkpoint.best`` section."""

    metric: str
    mode: Literal["min", "max"]
    patience: int | None


@dataclass(frozen=True)
class CheckpointPlan:
    """The settings of the ``engine.checkpoint`` section.

    If ``dir`` is None, checkpoints are not saved or loaded automatically.
    """

    dir: str | None
    every: int | str | None
    """Interval between checkpoints: a number of steps or a time string."""
    keep: int | None
    keep_every: int | None
    is_async: bool
    """Whether checkpoints are written in the background (the config key ``async``)."""
    resume: Literal["auto", "must", "never"]
    override: bool
    trust_pickle: bool
    """Whether objects of any class may be unpickled from a checkpoint in DeepSpeed's format."""
    best: BestSettings | None


@dataclass(frozen=True)
class ReportPaths:
    """Paths to which rank 0 writes the report of a run (``engine.report``)."""

    page: str
    """HTML file with the charts of the run."""
    directory: str
    """Directory for the plots of AutoWU and the results of LRRangeTest."""


@dataclass(frozen=True)
class DataSettings:
    """Settings of the data loader that `initialize` returns."""

    seed: int
    """Seed for shuffling the samples."""
    drop_last: bool
    """Whether the last batch of an epoch is dropped if it is incomplete."""
    num_workers: int
    """Number of processes that load data in the background."""
    prefetch_factor: int | None
    """Number of micro-batches that each worker loads in advance; None means 2."""
    persistent_workers: bool
    """Whether the workers keep running between epochs."""
    pin_memory: bool
    """Whether batches are loaded into pinned memory; ignored without a GPU."""
    shuffle: bool
    """Whether the samples of a map-style dataset are reshuffled in each epoch."""


@dataclass(frozen=True)
class ModelSettings:
    """Settings for preparing and training the model."""

    wrap_classes: tuple[str, ...]
    """Class names of the model's blocks. Each block is sharded or recomputed as a unit."""
    activation_checkpointing: Literal["device", "host"] | None
    """Memory that holds the inputs of recomputed blocks; None if no block is recomputed."""
    compile_backend: str | None
    """The backend of torch.compile; None if the model is not compiled."""
    master_weights: bool
    """Whether the PyTorch backend converts trainable 16-bit parameters to float32."""
    cast_inputs: bool
    """Whether layers with 16-bit weights cast floating-point inputs to the weights' dtype."""
    deferred_step: bool | None
    """Whether `step` may return before the device finishes the update; None means only on a GPU."""
    device: Literal["auto", "cuda", "cpu"]
    """Device type to train on; "auto" means a GPU if PyTorch finds one, otherwise the CPU."""


@dataclass(frozen=True)
class ProgressSettings:
    """Settings for the progress reports of rank 0."""

    is_logged: bool
    """Whether the loss and the learning rate are reported; false for ``steps_per_print: null``."""
    every: int | None
    """Number of steps between reports; None to use the default of `ProgressReporter`."""
    has_bar: bool
    """Whether the reports appear in a progress bar instead of as log lines."""


@dataclass(frozen=True)
class Diagnostics:
    """Settings for the diagnostics that a run logs."""

    wall_clock_breakdown: bool
    """Whether each progress line includes the mean forward, backward and step times."""
    dump_state: bool
    """Whether to log the resolved config and the engine's state when the run starts."""
    flops_profiler: Mapping[str, Any]
    """The ``flops_profiler`` section, with defaults filled in."""


@dataclass(frozen=True)
class Config(Mapping[str, Any]):
    """A valid config. The attributes include all defaults and derived values.

    Accessed as a mapping, the config contains only the keys and values that the user set (``raw``).
    """

    name: str
    backend: BackendChoice
    raw: Mapping[str, Any]
    """The user's config, including command-line overrides, without defaults."""
    zero_stage: int
    """ZeRO stage: 0 shards nothing, 1 optimizer states, 2 also gradients, 3 also parameters."""
    cpu_offload: bool
    """Whether parameters or optimizer states are offloaded to CPU memory or NVMe."""
    model: ModelSettings
    max_skipped_steps: int | None
    """Number of consecutive skipped steps after which the run fails; None for no limit."""
    batch: BatchSizes
    gradient_clipping: float
    precision: Literal["fp32", "bf16", "fp16"]
    loss_scaling: LossScaling | None
    optimizer: OptimizerBlock | None
    schedule: Schedule[Any] | None
    progress: ProgressSettings
    diagnostics: Diagnostics
    data: DataSettings
    report: ReportPaths | None
    """Where to write the report; None to write no report."""
    checkpoint: CheckpointPlan
    monitors: Mapping[str, Mapping[str, Any]]
    """The ``tensorboard``, ``csv_monitor`` and ``wandb`` sections, with defaults filled in."""
    overrides: tuple[Override, ...]
    warnings: tuple[Problem, ...]
    """Problems of severity "warning": likely mistakes that do not prevent the run from starting."""
    keys_without_effect: tuple[str, ...]
    """Dotted names of the keys that do not affect the results of this run."""
    run: Mapping[str, Any]
    """The duration settings of the ``engine`` section, such as ``max_duration``."""

    def __getitem__(self, key: str) -> Any:
        return self.raw[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def copy_for_trial_run(self, schedule: Schedule[Any] | None) -> Config:
        """Return a copy of the config for a trial run of the LR finder.

        The copy disables checkpoints, monitors, progress reports, diagnostics, the report
        (``engine.report``) and ``engine.steps_this_run``.

        Args:
            schedule: schedule of the trial run; None to use no schedule.
        """
        off = CheckpointPlan(
            dir=None,
            every=None,
            keep=None,
            keep_every=None,
            is_async=False,
            resume="never",
            override=False,
            trust_pickle=False,
            best=None,
        )
        silent = {name: {**section, "enabled": False} for name, section in self.monitors.items()}
        return replace(
            self,
            schedule=schedule,
            checkpoint=off,
            monitors=silent,
            progress=ProgressSettings(is_logged=False, every=None, has_bar=False),
            diagnostics=Diagnostics(
                wall_clock_breakdown=False, dump_state=False, flops_profiler={"enabled": False}
            ),
            run={**self.run, "steps_this_run": None},
            report=None,
        )

    def horizon(self, steps_per_epoch: float | None) -> Horizon:
        """Return the length of the run, for converting durations to steps.

        Args:
            steps_per_epoch: number of optimizer steps per epoch; None if unknown.

        Raises:
            DurationError: ``max_duration`` is in epochs and ``steps_per_epoch`` is None, or the run
                is shorter than one step or longer than 2**53 steps.
        """
        return build_horizon(
            self.run, samples_per_step=self.batch.train, steps_per_epoch=steps_per_epoch
        )


def load_config(
    config: Source,
    *,
    world_size: int = 1,
    args: argparse.Namespace | None = None,
    assignments: Sequence[str] = (),
    needs_deepspeed: str | None = None,
    count_ranks: RankCounter = count_data_ranks,
) -> Config:
    """Load and validate a config, and fill in all defaults and derived values.

    Custom classes named in the config, such as ``"my_module:MySchedule"``, are imported. To check a
    config that you do not trust, use `validate` instead.

    Args:
        config: path of the config, or the config as a dict. The dict is not modified.
        world_size: number of ranks of the run.
        args: parsed command-line arguments. Arguments from `add_schedule_arguments` override config
            values.
        assignments: ``KEY=VALUE`` strings that override config values, such as
            "optimizer.params.lr=0.01". They take precedence over ``args``.
        needs_deepspeed: model feature or `initialize` argument that only DeepSpeed supports, and
            that therefore selects DeepSpeed; None if there is none.
        count_ranks: function that takes the config and the world size, and returns the number of
            data-parallel ranks. By default, this number is derived from the config's parallelism
            settings.

    Raises:
        ConfigError: the config cannot be read or is invalid; ``problems`` lists every error.

    >>> print(load_config({"train_batch_size": 8}, world_size=2).batch)
    batch size 8 = 4 per rank x 1 accumulation step x 2 ranks
    """
    document = load_document(config)
    overrides: Sequence[Override] = ()
    if args is not None:
        from engine.config.overrides import apply_overrides

        document, overrides = apply_overrides(document, args)
        unserializable = list(find_unserializable(document.value, ""))
        if unserializable:
            raise ConfigError(document.name, unserializable)
    if assignments:
        from engine.config.overrides import apply_assignments

        document, changes = apply_assignments(document, assignments)
        overrides = (*overrides, *changes)
    problems, context = examine(
        document,
        world_size,
        reject_auto=True,
        needs_deepspeed=needs_deepspeed,
        count_ranks=count_ranks,
        allow_imports=True,
    )
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors or context is None:
        raise ConfigError(document.name, errors)
    return _resolve(context, overrides, problems)


def _resolve(
    context: RuleContext,
    overrides: Sequence[Override],
    problems: Sequence[Problem],
) -> Config:
    raw = context.document.value
    value = add_defaults(raw, schemas.read(SCHEMA))
    fp16, bf16 = value["fp16"], value["bfloat16" if "bfloat16" in value else "bf16"]
    engine = value["engine"]
    enabled = fp16["enabled"]
    return Config(
        name=context.document.name,
        backend=context.backend,
        raw=raw,
        zero_stage=int(zero_stage(raw)),
        cpu_offload=any(
            find_offload_device(raw, name) != "none"
            for name in ("offload_param", "offload_optimizer")
        ),
        model=ModelSettings(
            wrap_classes=tuple(engine["wrap"]),
            activation_checkpointing=_get_input_storage(raw.get("activation_checkpointing")),
            compile_backend=engine["compile"],
            master_weights=engine["master_weights"],
            cast_inputs=engine["cast_inputs"],
            deferred_step=engine["deferred_step"],
            device=engine["device"],
        ),
        max_skipped_steps=engine["max_skipped_steps"],
        batch=derive_batch_sizes(
            {key: value[key] for key in BATCH_KEYS if key in value}, context.data_ranks or 1
        ),
        gradient_clipping=_find_clipping(value),
        precision="fp16" if enabled else "bf16" if bf16["enabled"] else "fp32",
        loss_scaling=LossScaling(**{key: fp16[key] for key in _LOSS_SCALING}) if enabled else None,
        optimizer=build_optimizer_block(
            raw.get("optimizer"), context.backend.name, context.group_schedules
        ),
        schedule=context.schedule,
        progress=ProgressSettings(
            is_logged=raw.get("steps_per_print", 1) is not None,
            every=raw.get("steps_per_print"),
            has_bar=engine["progress_bar"],
        ),
        diagnostics=Diagnostics(
            value["wall_clock_breakdown"], value["dump_state"], value["flops_profiler"]
        ),
        data=DataSettings(engine["seed"], value["dataloader_drop_last"], **engine["dataloader"]),
        report=_find_report_paths(engine["report"]),
        overrides=tuple(overrides),
        warnings=tuple(each for each in problems if each.severity == "warning"),
        keys_without_effect=tuple(
            dotted_name(each.pointer) for each in problems if each.rule == "no-effect"
        ),
        checkpoint=_build_checkpoint_plan(engine["checkpoint"]),
        monitors={name: value[name] for name in ("tensorboard", "csv_monitor", "wandb")},
        run={key: engine[key] for key in _RUN if key in engine},
    )


def _find_clipping(value: Mapping[str, Any]) -> float:
    """Return the maximum norm of the gradients, or 0 if they are not clipped."""
    zero = value["zero_optimization"]
    if isinstance(zero, Mapping) and zero.get("compute_grad_norm") is False:
        return 0.0  # clipping requires the norm; the validator rejects an explicit maximum
    clipping: float = value["gradient_clipping"]
    return clipping


def drop_group_schedules(config: Config) -> Config:
    """Return a copy of the config without the schedules of individual param groups."""
    if config.optimizer is None:
        return config
    return replace(config, optimizer=replace(config.optimizer, group_schedules={}))


def _build_checkpoint_plan(section: Mapping[str, Any]) -> CheckpointPlan:
    plan = dict(section)
    best = plan.pop("best")
    return CheckpointPlan(
        is_async=plan.pop("async"),  # async is a Python keyword
        best=None if best is None else BestSettings(**best),
        **plan,
    )


def _find_report_paths(value: str | None) -> ReportPaths | None:
    """Return the paths of the report, or None if the run writes no report.

    Args:
        value: value of ``engine.report``: the path of an HTML file or a directory, or None.
    """
    if value is None:
        return None
    path = Path(value)
    if path.suffix.lower() in {".html", ".htm"}:
        return ReportPaths(value, str(path.parent))
    return ReportPaths(str(path / "report.html"), value)


def _get_input_storage(section: Mapping[str, Any] | None) -> Literal["device", "host"] | None:
    if section is None:
        return None
    return "host" if section.get("cpu_checkpointing") else "device"

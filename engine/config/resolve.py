"""A config that was proved right, resolved: every value in place, ready to run."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import schemas
from engine.config.backend_choice import Choice, choose
from engine.config.batch_sizes import BATCH_KEYS, BatchSizes, solve
from engine.config.horizon import horizon_of
from engine.config.parser import Document, is_finite, parse
from engine.config.pointers import pointer_to
from engine.config.schema import (
    SCHEMA,
    optimizer_members,
    optimizer_name,
    optimizer_schema,
    walk,
    with_defaults,
)
from engine.config.validate import check
from engine.errors import ConfigError, Problem
from schedules import Horizon, Schedule, from_config

if TYPE_CHECKING:
    import argparse

    from engine.config.overrides import Override

__all__ = ["Config", "LossScaling", "Source", "load_config", "load_document", "validate"]

# The largest real one that is known has some thousand; a file of gigabytes is a wrong path.
_MOST = 1_000_000

Source = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class LossScaling:
    """How the loss of a float16 run is scaled, by the keys of the section ``fp16``."""

    loss_scale: float
    initial_scale_power: int
    loss_scale_window: int
    hysteresis: int
    consecutive_hysteresis: bool
    min_loss_scale: int


_LOSS_SCALING = tuple(field.name for field in fields(LossScaling))
_RUN = ("max_duration", "scale_schedule_ratio", "scale_warmup")


@dataclass(frozen=True)
class CheckpointPlan:
    """The section ``engine.checkpoint``; without ``dir`` only the script saves and loads."""

    dir: str | None
    every: int | None
    keep: int | None
    keep_every: int | None
    behind: bool
    """Whether training goes on while a checkpoint is written: the key ``async``."""
    resume: Literal["auto", "must", "never"]
    override: bool


@dataclass(frozen=True)
class OptimizerBlock:
    """An optimizer's proper name and all of its parameters."""

    type: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Config:
    """A config that was proved right; defaults are filled in, derived values derived."""

    name: str
    backend: Choice
    own: Mapping[str, Any]
    """The user's config as it was given, arguments included."""
    zero_stage: int
    """0 replicates; 1, 2 and 3 divide optimizer states, gradients, and parameters."""
    offloads: bool
    """Whether parameters and optimizer states live in the host's memory."""
    wrap: tuple[str, ...]
    """Classes of the modules that are gathered, or computed again, one at a time."""
    recomputes: Literal["device", "host"] | None
    """Where blocks that are computed again keep their inputs; None: none are."""
    compiles: str | None
    """The backend of torch.compile; None: the model runs as it is."""
    finds_unused: bool
    """Whether data parallelism looks for parameters that a forward pass left out."""
    batch: BatchSizes
    gradient_clipping: float
    precision: Literal["fp32", "bf16", "fp16"]
    loss_scaling: LossScaling | None
    optimizer: OptimizerBlock | None
    schedule: Schedule[Any] | None
    steps_per_print: int | None
    dataloader_drop_last: bool
    seed: int
    steps_this_run: int | None
    report: str | None
    """Folder for pictures of what a schedule has found out."""
    checkpoint: CheckpointPlan
    monitors: Mapping[str, Mapping[str, Any]]
    """The sections ``tensorboard``, ``csv_monitor`` and ``wandb``."""
    overrides: tuple[Override, ...]
    warnings: tuple[Problem, ...]
    """What is not wrong, but hardly meant."""
    run: Mapping[str, Any]
    """``max_duration``, ``scale_schedule_ratio`` and ``scale_warmup`` of the section ``engine``."""

    def for_trial_run(self, schedule: Schedule[Any] | None) -> Config:
        """Return the config of a trial run by another schedule, which writes no files."""
        off = CheckpointPlan(None, None, None, None, behind=False, resume="never", override=False)
        silent = {name: {**section, "enabled": False} for name, section in self.monitors.items()}
        return replace(
            self,
            schedule=schedule,
            checkpoint=off,
            monitors=silent,
            steps_per_print=None,
            steps_this_run=None,
            report=None,
        )

    def horizon(self, steps_per_epoch: float | None) -> Horizon:
        """Return the run that durations are a part of.

        Raises:
            DurationError: the length of the run is in epochs, whose length is not known.
        """
        return horizon_of(
            self.run, samples_per_step=self.batch.train, steps_per_epoch=steps_per_epoch
        )


def validate(config: Source, *, world_size: int | None = None) -> list[Problem]:
    """Return all that is wrong with a config, in the order of its places; nothing when it is right.

    Args:
        config: a path, or the config as a dict.
        world_size: number of ranks to prove the batch sizes for; None: what holds for any number.

    Raises:
        ConfigError: there is no such file, or it is no text.

    >>> [problem.rule for problem in validate({"train_batch_size": 8, "sheduler": {}})]
    ['unknown-key']
    """
    return check(load_document(config), world_size)


def load_config(
    config: Source, *, world_size: int = 1, args: argparse.Namespace | None = None
) -> Config:
    """Return a config, proved right and resolved.

    Args:
        config: a path, or the config as a dict, which is not changed.
        world_size: number of ranks that the run has.
        args: a namespace of `add_config_arguments`, whose arguments win over the config.

    Raises:
        ConfigError: anything is wrong with it; ``problems`` holds all of it.

    >>> print(load_config({"train_batch_size": 8}, world_size=2).batch)
    batch 8 = 4 a rank x 1 accumulated x 2 ranks
    """
    document = load_document(config)
    overrides: Sequence[Override] = ()
    if args is not None:
        from engine.config.overrides import override

        document, overrides = override(document, args)
        unspeakable = list(_unspeakable(document.value, ""))
        if unspeakable:
            raise ConfigError(document.name, unspeakable)
    problems = check(document, world_size, runs=True)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise ConfigError(document.name, errors)
    warnings = [problem for problem in problems if problem.severity == "warning"]
    return _resolve(document, world_size, overrides, warnings)


def _resolve(
    document: Document,
    world_size: int,
    overrides: Sequence[Override],
    warnings: Sequence[Problem],
) -> Config:
    value = with_defaults(document.value, schemas.read(SCHEMA))
    fp16, bf16 = value["fp16"], value.get("bfloat16", value["bf16"])
    zero = document.value.get("zero_optimization", {})
    members = list(walk(document.value, schemas.read(SCHEMA)))
    optimizer = None
    if "optimizer" in value:
        members += optimizer_members(document.value["optimizer"])
        name = optimizer_name(value["optimizer"]["type"])
        assert name is not None
        params = with_defaults(value["optimizer"]["params"], optimizer_schema(name))
        optimizer = OptimizerBlock(name, params)
    enabled = fp16["enabled"]
    return Config(
        name=document.name,
        backend=choose(document.value, members),
        own=document.value,
        zero_stage=int(zero if isinstance(zero, bool) else zero.get("stage", 0)),
        offloads=not isinstance(zero, bool) and _offloads(zero),
        wrap=tuple(value["engine"].pop("wrap")),
        recomputes=_recomputes(document.value.get("activation_checkpointing")),
        compiles=value["engine"].pop("compile"),
        finds_unused=value["engine"].pop("find_unused_parameters"),
        batch=solve({key: value[key] for key in BATCH_KEYS if key in value}, world_size),
        gradient_clipping=value["gradient_clipping"],
        precision="fp16" if enabled else "bf16" if bf16["enabled"] else "fp32",
        loss_scaling=LossScaling(**{key: fp16[key] for key in _LOSS_SCALING}) if enabled else None,
        optimizer=optimizer,
        schedule=from_config(value["scheduler"]) if "scheduler" in value else None,
        steps_per_print=value["steps_per_print"],
        dataloader_drop_last=value["dataloader_drop_last"],
        seed=value["engine"].pop("seed"),
        steps_this_run=value["engine"].pop("steps_this_run"),
        report=value["engine"].pop("report"),
        overrides=tuple(overrides),
        warnings=tuple(warnings),
        checkpoint=_checkpoint_plan(value["engine"]["checkpoint"]),
        monitors={name: value[name] for name in ("tensorboard", "csv_monitor", "wandb")},
        run={key: value["engine"].get(key) for key in _RUN if key in value["engine"]},
    )


def _checkpoint_plan(section: Mapping[str, Any]) -> CheckpointPlan:
    plan = dict(section)
    return CheckpointPlan(behind=plan.pop("async"), **plan)  # async is a word of Python


def _recomputes(section: Mapping[str, Any] | None) -> Literal["device", "host"] | None:
    if section is None:
        return None
    return "host" if section.get("cpu_checkpointing") else "device"


def _offloads(zero: Mapping[str, Any]) -> bool:
    blocks = (zero.get(name) or {} for name in ("offload_param", "offload_optimizer"))
    return any(block.get("device", "none") != "none" for block in blocks)


def load_document(config: Source) -> Document:
    """Return the document of a config file or dict.

    Raises:
        ConfigError: there is no such file, or it is no text.
    """
    if isinstance(config, Mapping):
        return _from_mapping(config)
    path = Path(config)
    name = str(config)
    try:
        data = sys.stdin.buffer.read(_MOST + 1) if name == "-" else _read(path)
        if len(data) > _MOST:
            raise _unreadable(name, f"a config must be at most {_MOST:,} bytes, but is longer.")
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(
            name, f"a config must be UTF-8 text, but byte {error.start} is not."
        ) from None
    except FileNotFoundError:
        near = _nearest_file(path)
        hint = f"The nearest is {near}." if near else f"{path.parent} holds no JSON file."
        raise _unreadable(name, "a config must be a file, but there is none here.", hint) from None
    except OSError as error:
        raise _unreadable(
            name, f"a config must be a readable file, but: {error.strerror}."
        ) from None
    return parse(text, name)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST + 1)


def _from_mapping(config: Mapping[str, Any]) -> Document:
    problems = tuple(_unspeakable(config, ""))
    value = config
    if not problems:
        # A copy by way of JSON: what is checked is what a file would hold, and it stays so.
        value = json.loads(json.dumps(config, default=dict))
    return Document("config", value, problems=problems)


def _unspeakable(value: Any, pointer: str) -> Iterator[Problem]:
    """Yield what JSON cannot say: keys that are no strings, NaN, objects of other kinds."""
    members: Any = ()
    if isinstance(value, Mapping):
        members = value.items()
    elif isinstance(value, list | tuple):
        members = enumerate(value)
    elif isinstance(value, int | float) and not is_finite(value):
        shown = value if isinstance(value, float) else "longer than any float"
        message = f"`{pointer}` must be a finite number, but is {shown} instead."
        yield Problem("not-finite", "error", pointer, 0, 0, message)
    elif not isinstance(value, str | int | float | bool | None):
        message = f"`{pointer}` must be a value that JSON has, but is {value!r} instead."
        yield Problem("wrong-type", "error", pointer, 0, 0, message)
    for key, below in members:
        if isinstance(value, Mapping) and not isinstance(key, str):
            message = f"a key of `{pointer or 'the config'}` must be a string, but is {key!r}."
            yield Problem("wrong-type", "error", pointer, 0, 0, message)
        yield from _unspeakable(below, pointer_to(pointer, key))


def _unreadable(name: str, message: str, hint: str = "") -> ConfigError:
    return ConfigError(name, [Problem("unreadable", "error", "", 0, 0, message, hint)])


def _nearest_file(path: Path) -> Path | None:
    folder = path.parent
    if not folder.is_dir():
        return None
    names = sorted(other.name for other in folder.glob("*.json"))
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.3) or names[:1]
    return folder / near[0] if near else None

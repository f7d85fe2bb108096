"""Run DeepSpeed's diagnostics on the PyTorch backend: timings, model profile and initial state.

Disabled diagnostics cost no time, because they leave the backend's methods unchanged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import schemas
from engine.config import Config
from engine.config.pointers import dotted_name
from engine.config.schema import SCHEMA, add_defaults, walk
from engine.training.flops_profile import format_profile, profile_modules
from engine.training.pass_timer import PassTimer
from engine.training.progress import Counters, ProgressReporter

__all__ = ["attach_diagnostics"]

log = logging.getLogger("onecycle")


def attach_diagnostics(
    config: Config, backend: Any, progress: ProgressReporter, get_counters: Callable[[], Counters]
) -> None:
    """Start the configured diagnostics on rank 0 if the run uses the PyTorch backend.

    With the DeepSpeed backend, do nothing, because DeepSpeed runs the diagnostics itself.

    Args:
        config: config of the run.
        backend: backend of the run. Its timed or profiled methods are replaced with wrappers.
        progress: progress reporter that logs the measured times.
        get_counters: function that returns the current counters of the run.
    """
    settings = config.diagnostics
    if config.backend.name == "deepspeed" or backend.ranks.rank != 0:
        return
    if settings.dump_state:
        for line in _describe_state(config, backend, get_counters()):
            log.info("%s", line)
    if settings.wall_clock_breakdown:
        progress.timer = PassTimer(backend.ranks.device)
        for name in ("forward", "backward", "step"):
            setattr(backend, name, progress.timer.measure(name, getattr(backend, name)))
    if settings.flops_profiler["enabled"]:
        _profile_once(backend, settings.flops_profiler, get_counters)


def _profile_once(
    backend: Any, settings: Mapping[str, Any], get_counters: Callable[[], Counters]
) -> None:
    """Profile the first forward pass after ``settings["profile_step"]`` steps.

    Forward passes with gradients disabled, such as those in an evaluation, are not profiled.
    """
    forward = backend.forward

    def profiled(*args: Any, **kwargs: Any) -> Any:
        steps = get_counters().global_steps
        if not torch.is_grad_enabled() or steps < settings["profile_step"]:
            return forward(*args, **kwargs)
        backend.forward = forward
        with profile_modules(backend.model, backend.ranks.device) as profiles:
            output = forward(*args, **kwargs)
        _write_report("\n".join(format_profile(profiles, settings)), settings["output_file"])
        return output

    if get_counters().global_steps <= settings["profile_step"]:
        backend.forward = profiled


def _write_report(report: str, output_file: str | None) -> None:
    if output_file is None:
        print(report, flush=True)  # noqa: T201  # as in DeepSpeed, whose log has a prefix per line
        return
    path = Path(output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{report}\n", encoding="utf-8")
    log.info("wrote the profile of the model to %s", path)


def _describe_state(config: Config, backend: Any, counters: Counters) -> Iterator[str]:
    """Yield lines with the resolved config and the state of the run."""
    schema, sizes = schemas.read(SCHEMA), config.batch
    values = add_defaults(config.raw, schema) | {
        "train_batch_size": sizes.train,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
    }
    yield f"config {config.name}:"
    for pointer, value in sorted(
        (each.pointer, each.value) for each in walk(values, schema) if not each.is_section
    ):
        yield f"  {dotted_name(pointer)} = {json.dumps(value)}"
    yield "engine:"
    ranks = backend.ranks
    state = {"device": ranks.device, "world_size": ranks.world_size, **vars(counters)}
    for name, value in (state | {"loss_scale": backend.loss_scale}).items():
        yield f"  {name} = {value}"
    for index, group in enumerate(backend.basic_optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        yield f"  param group {index}: {len(group['params'])} parameters, {settings}"

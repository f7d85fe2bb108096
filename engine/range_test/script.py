"""Run an LR range test in a training script.

`onecycle lr-test` or an `LRRangeTest` schedule in the config starts the test.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim import Optimizer

from engine.config import Config
from engine.config.resolve import drop_group_schedules
from engine.engine import Engine
from engine.errors import MisuseError
from engine.range_test.recorder import RECORD, Recorder
from engine.range_test.suggestion import MIN_POINTS
from engine.range_test.sweep import Sweep, read_initial_lrs, spread_over_groups
from schedules import LRRangeTest, from_config
from schedules.core.extras import MissingExtraError

__all__ = ["apply_sweep", "attach_recorder", "is_next_engine_swept", "spread_sweep"]

log = logging.getLogger("onecycle")

_engines = itertools.count(1)
"""Counter of the engines that this process creates during `onecycle lr-test`."""
_reports: list[Path] = []
"""Report directories that engines in this process have requested, including duplicates."""


def is_next_engine_swept(sweep: Sweep) -> bool:
    """Return whether the next engine that the script creates runs the LR range test.

    Call this function once before creating each engine. Engines that do not run the test use the
    schedules in their configs.

    Raises:
        MisuseError: if the script creates a second engine, but `sweep` does not select an engine.
    """
    number = next(_engines)
    if sweep.engine is None and number > 1:
        raise MisuseError(
            "`onecycle lr-test` tests one engine, but this script calls `engine.initialize` "
            "several times. Select an engine: `--engine 1` tests the first engine of the script, "
            "`--engine 2` the second engine, and so on."
        )
    return number == (sweep.engine or 1)


def apply_sweep(config: Config, sweep: Sweep) -> Config:
    """Return a copy of a config with the sweep of `onecycle lr-test` as its schedule.

    A nonzero seed offset of the sweep is added to the seed in the copy and to torch's global seed.
    """
    changed = config.copy_for_trial_run(from_config(sweep.scheduler))
    if sweep.seed_offset:
        torch.manual_seed(torch.initial_seed() + sweep.seed_offset)
    data = replace(config.data, seed=config.data.seed + sweep.seed_offset)
    return drop_group_schedules(replace(changed, data=data))


def spread_sweep(config: Config, sweep: Sweep, optimizer: Optimizer) -> Config:
    """Return a config whose sweep keeps the ratios between the param groups' initial LRs."""
    lrs = read_initial_lrs(optimizer.param_groups)
    return replace(config, schedule=from_config(spread_over_groups(sweep.scheduler, lrs)))


def attach_recorder(engine: Engine, sweep: Sweep | None) -> None:
    """Attach a recorder to an engine if its schedule is an LR range test.

    With `onecycle lr-test`, the script ends when the sweep is over. With an `LRRangeTest` in the
    config, training continues, and the report is written when the process exits.

    Args:
        engine: training engine before its first step.
        sweep: sweep of `onecycle lr-test`. If None, a recorder is attached only if the schedule in
            the config is an `LRRangeTest`.
    """
    is_first = engine.global_rank == 0
    if sweep is not None:
        facts = {
            "backend": engine.config.backend.name,
            "world_size": engine.world_size,
            "precision": engine.config.precision,
            "train_batch_size": engine.train_batch_size(),
            "lrs": read_initial_lrs(engine.optimizer.param_groups),
            "steps": sweep.steps,
        }
        path = Path(sweep.directory) / RECORD if sweep.directory and is_first else None
        recorder = Recorder(sweep.steps, sweep.divergence_factor, path, facts)
        engine._run.record_steps(recorder, is_trial=True)  # noqa: SLF001  # private to the package
    elif isinstance(engine.config.schedule, LRRangeTest):
        recorder = Recorder(None, math.inf, facts={"steps": None})
        engine._run.record_steps(recorder, is_trial=False)  # noqa: SLF001  # private to the package
        if is_first:
            report = engine.config.report
            directory = Path("lr_test" if report is None else report.directory)
            atexit.register(_write_report, recorder, _find_own_directory(directory))


def _find_own_directory(directory: Path) -> Path:
    """Return a report directory that no other engine in this process uses.

    If ``directory`` is already in use, a number is appended to the directory name.
    """
    count = _reports.count(directory)
    _reports.append(directory)
    return directory if count == 0 else directory.with_name(f"{directory.name}_{count + 1}")


def _write_report(recorder: Recorder, directory: Path) -> None:
    from engine.range_test.report import LRRangeReport

    if not recorder.run.lrs:
        return
    if len(recorder.run.curve[0]) < MIN_POINTS:
        log.warning(
            "LR range test: the script ended after %d steps, but the test needs at least %d; train "
            "for more epochs, or use smaller batches",
            len(recorder.run.lrs),
            MIN_POINTS + 1,
        )
        return
    report = LRRangeReport((recorder.run,))
    try:
        picture, _ = report.write(directory)
        where = f"See the plot in {picture}."
    except MissingExtraError as error:
        where = f"There is no plot: {error}"
    found = report.suggestion
    verdict = (
        f"suggested cycle_max_lr: {found.max_lr:.2g}"
        if found.max_lr
        else f"no suggestion: {found.reason}"
    )
    log.info("LR range test: %s. %s", verdict, where)

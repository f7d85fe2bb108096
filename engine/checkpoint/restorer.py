"""Restore a training run from a selected checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint.collectives import raise_on_all_ranks
from engine.checkpoint.data_position import DataPosition
from engine.checkpoint.fingerprint import Identity, check_identity
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.plain_values import read_values, report_damage
from engine.checkpoint.run_interface import RunState, SavedBackend
from engine.checkpoint.schedule_state import (
    advance,
    convert_deepspeed_state,
    prepare_schedule_state,
)
from engine.checkpoint.selection import RUN_STATE, Selected
from engine.config.resolve import CheckpointPlan
from engine.distributed.environment import ELASTIC
from engine.training.progress import Counters
from engine.training.rng import check_rng_state, set_rng_state

__all__ = ["Parts", "Restorer"]

log = logging.getLogger("onecycle")

_NOT_LOADED = "The checkpoint was not loaded"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Flags that select the states to restore in addition to the model."""

    optimizer: bool
    """Whether to restore the optimizer, the loss scaler and the RNG states."""
    scheduler: bool
    """Whether to restore the scheduler."""
    counters: bool
    """Whether to restore the step counters and the position in the training data."""


@dataclass(frozen=True)
class _SmallFiles:
    """Saved states other than the model and optimizer; None for each state that is not restored."""

    random_state: Any = None
    position: Any = None
    schedule: Any = None
    """State of the scheduler."""
    snapshot: Any = None
    """Snapshot of the model and optimizer that AutoWU can roll back to."""


class Restorer:
    """Loader that restores a run from a checkpoint. Every rank must call `restore`.

    Args:
        plan: settings of the ``engine.checkpoint`` section.
        backend: backend that loads the model and the optimizer.
        identity: settings that must match between this run and a checkpoint.
        data: position in the training data.
    """

    def __init__(
        self, plan: CheckpointPlan, backend: SavedBackend, identity: Identity, data: DataPosition
    ) -> None:
        self._plan = plan
        self._backend = backend
        self._ranks = backend.ranks
        self._identity = identity
        self._data = data

    def restore(self, run: RunState, selected: Selected, parts: Parts, *, strict: bool) -> None:
        """Restore a run from a checkpoint.

        Args:
            run: state of the run to restore.
            selected: checkpoint to restore from.
            parts: states to restore in addition to the model.
            strict: whether the checkpoint and the model must have the same parameters and buffers.

        Raises:
            CheckpointError: if the checkpoint is damaged, or does not match the model or the run.
        """
        checkpoint_dir, manifest, state = selected.path, selected.manifest, selected.state
        self._check_match(run, selected, parts)
        # Read and check the small files first, so that a damaged file leaves the run unchanged.
        with raise_on_all_ranks(self._ranks, _NOT_LOADED):
            small = self._read_small_files(run, selected, parts)
        own_groups = [_copy_settings(group) for group in self._backend.optimizer.param_groups]
        with ExitStack() as stack:
            with raise_on_all_ranks(self._ranks, _NOT_LOADED):
                stack.enter_context(self._data.restore(small.position, checkpoint_dir))
            self._backend.load(
                checkpoint_dir, optimizer=parts.optimizer, strict=strict, frozen=manifest.frozen
            )
        if self._plan.override:  # keep this run's learning rate, betas and weight decay
            for group, settings in zip(
                self._backend.optimizer.param_groups, own_groups, strict=True
            ):
                group.update(settings)
        if small.random_state is not None:
            set_rng_state(small.random_state)
        if parts.counters:
            _restore_counters(run, state)
            if run.best is not None:
                run.best.load_state_dict(state.get("best"))
        if parts.scheduler:
            _restore_schedule(run, small)
        if selected.is_foreign and parts.counters and self._ranks.rank == 0:
            log.warning(
                "the position in the training data and the random state were not restored, because "
                "the DeepSpeed checkpoint %s does not contain them",
                checkpoint_dir,
            )

    def _check_match(self, run: RunState, selected: Selected, parts: Parts) -> None:
        """Check that the checkpoint matches this run, and discard an incompatible scheduler state.

        The state is discarded only if it is from a DeepSpeed checkpoint and this run uses a
        built-in schedule.
        """
        checkpoint_dir, manifest, state = selected.path, selected.manifest, selected.state
        is_converted = selected.is_foreign and parts.scheduler and not self._plan.override
        if is_converted and run.scheduler is not None:
            state["lr_scheduler"] = convert_deepspeed_state(
                checkpoint_dir, state["lr_scheduler"], run.scheduler
            )
        if parts.optimizer and not self._plan.override and not selected.is_foreign:
            check_identity(checkpoint_dir, manifest.identity, self._expected_identity(manifest))
        if not manifest.frozen and self._ranks.rank == 0:
            log.info(
                "%s does not contain the frozen parameters, so the model keeps their current "
                "values",
                checkpoint_dir,
            )

    def _expected_identity(self, manifest: Manifest) -> Identity:
        if not os.environ.get(ELASTIC):
            return self._identity
        # The world size of an elastic run may change, but not the batch size or the schedule.
        return {**self._identity, "world_size": manifest.identity.get("world_size")}

    def _read_small_files(self, run: RunState, selected: Selected, parts: Parts) -> _SmallFiles:
        """Read and check the random state, data position, scheduler state and AutoWU snapshot."""
        checkpoint_dir, manifest, state = selected.path, selected.manifest, selected.state
        random_state = position = schedule = snapshot = None
        if parts.optimizer:
            random_state = self._read_random_state(checkpoint_dir, manifest)
        if parts.counters and not selected.is_foreign:
            position = self._data.read(state, run.config.batch, checkpoint_dir, manifest.world_size)
        if parts.scheduler and run.scheduler is not None:
            steps = Counters(**state["counters"]) if parts.counters else run.counters
            path = checkpoint_dir if selected.is_foreign else checkpoint_dir / RUN_STATE
            with report_damage(path):
                schedule = prepare_schedule_state(
                    run.scheduler,
                    state,
                    run.config,
                    steps.applied_steps,
                    override=self._plan.override,
                )
            if run.rollback is not None:
                snapshot = run.rollback.read(checkpoint_dir)
        return _SmallFiles(random_state, position, schedule, snapshot)

    def _read_random_state(self, checkpoint_dir: Path, manifest: Manifest) -> Any:
        """Return this rank's saved random state.

        Return None if the state was not saved or the world size has changed.
        """
        path = checkpoint_dir / f"random.{self._ranks.rank}.pt"
        if not path.is_file() or manifest.world_size != self._ranks.world_size:
            return None
        random_state = read_values(path)
        with report_damage(path):
            check_rng_state(random_state)
        return random_state


def _restore_counters(run: RunState, state: Mapping[str, Any]) -> None:
    """Restore the step counters, adjusted to the run's number of gradient accumulation steps."""
    batch = run.config.batch
    saved = state.get("batch") or asdict(batch)
    counters = Counters(**state["counters"])
    if saved["accumulation"] != batch.accumulation:
        counters.micro_steps = counters.global_steps * batch.accumulation
    if "global_samples" not in state["counters"]:  # written by an older version
        counters.global_samples = counters.global_steps * saved["train"]
    run.restore_counters(counters)
    run.progress.monitors.resume(state.get("monitors", {}), counters.global_samples)


def _restore_schedule(run: RunState, small: _SmallFiles) -> None:
    if run.scheduler is None:
        return
    if small.schedule is None:
        advance(run.scheduler, run.counters.applied_steps)
    else:
        run.scheduler.load_state_dict(small.schedule)
    if run.rollback is not None:
        run.rollback.snapshot = small.snapshot


def _copy_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a param group's settings, without its parameters and step count."""
    return {key: value for key, value in group.items() if key not in {"params", "step"}}

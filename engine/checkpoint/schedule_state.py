"""Adapt the saved state of a scheduler to a run with a different schedule or batch size."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from engine.checkpoint.deepspeed_files import SCHEDULE_KEYS
from engine.checkpoint.structure import check_same_structure
from engine.config import Config
from engine.errors import CheckpointError
from schedules import ScheduleBinder
from schedules.core.durations import has_data_durations

__all__ = [
    "advance",
    "convert_deepspeed_state",
    "prepare_schedule_state",
]

log = logging.getLogger("onecycle")


def convert_deepspeed_state(
    checkpoint_dir: Path, saved: Mapping[str, Any] | None, scheduler: LRScheduler
) -> Mapping[str, Any] | None:
    """Return the scheduler state in a DeepSpeed checkpoint if this run's scheduler can load it.

    Args:
        checkpoint_dir: directory of the checkpoint, for the error message.
        saved: scheduler state in the checkpoint; None if the checkpoint does not contain one.
        scheduler: scheduler of this run.

    Returns:
        The state, or None if the scheduler is a built-in schedule that cannot load it. In that
        case, the schedule continues at the current step of the run.

    Raises:
        CheckpointError: if the training script created the scheduler, and the checkpoint does not
            contain a state that this scheduler can load.
    """
    if isinstance(scheduler, ScheduleBinder):
        if saved is None or not saved.keys() >= SCHEDULE_KEYS:
            return None
        is_same = all(saved[key] == value for key, value in scheduler.identity.items())
        return saved if is_same else None
    kind = type(scheduler).__name__
    if saved is None:
        raise CheckpointError(
            f"{checkpoint_dir} does not contain the state of a scheduler, so `{kind}` cannot "
            "resume. Pass `load_lr_scheduler_states=False` to keep its current state."
        )
    if saved.keys() != scheduler.state_dict().keys():
        raise CheckpointError(
            f"{checkpoint_dir} contains the state of a scheduler that is not a `{kind}`. "
            "Use the scheduler of the saved run, or pass `load_lr_scheduler_states=False`."
        )
    return saved


def prepare_schedule_state(
    scheduler: LRScheduler,
    state: Mapping[str, Any],
    config: Config,
    steps: int,
    *,
    override: bool,
) -> dict[str, Any] | None:
    """Check that the scheduler can load the saved state, and return the state to load.

    Args:
        scheduler: scheduler of this run.
        state: saved state of the run, which includes the scheduler state.
        config: config of this run.
        steps: number of optimizer steps that have already been applied.
        override: whether this run's schedule replaces the saved schedule.

    Returns:
        The scheduler state, or None if a PyTorch scheduler replaces the saved schedule. In that
        case, the caller must advance the scheduler to ``steps`` with `advance`.

    Raises:
        ValueError: if the scheduler state is damaged.
    """
    saved = state["lr_scheduler"]
    if override and not isinstance(scheduler, ScheduleBinder):
        return None
    if saved is None or override:
        position = _convert_position(steps, config, state.get("batch") or {})
        saved = _adapt_schedule_state(saved or {}, scheduler.state_dict(), position)
    _check_schedule_state(scheduler, saved)
    return dict(saved)


def _convert_position(steps: int, config: Config, saved_batch: Mapping[str, int]) -> int:
    """Return the step at which a schedule continues after the batch size has changed.

    A schedule with durations in samples, epochs or fractions of the run continues after the same
    number of samples. With a larger batch size, the same number of samples corresponds to an
    earlier step. Any other schedule continues at the same step.

    Args:
        steps: number of optimizer steps that had been applied when the checkpoint was saved.
        config: config of this run.
        saved_batch: batch sizes in the checkpoint.
    """
    train, schedule = config.batch.train, config.schedule
    saved_train = saved_batch.get("train", train)
    if saved_train == train or schedule is None or not has_data_durations(schedule):
        return steps
    return round(steps * saved_train / train)


def _check_schedule_state(scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Check that a scheduler can load a state. The scheduler itself stays unchanged.

    Raises:
        Exception: if the state is damaged, or does not match the scheduler.
    """
    if isinstance(scheduler, ScheduleBinder):
        scheduler.check_state_dict(state)
        return
    own = copy.deepcopy(scheduler.state_dict())
    is_from_torch = type(scheduler).__module__ == LRScheduler.__module__
    # The values of a custom scheduler may change their type or length, so only check the keys.
    expected = _fix_lengths(own) if is_from_torch else dict.fromkeys(own)
    check_same_structure(state, expected, "lr_scheduler")
    try:
        scheduler.load_state_dict(copy.deepcopy(state))
    finally:
        scheduler.load_state_dict(own)


def _fix_lengths(value: Any) -> Any:
    """Convert lists to tuples, so that `check_same_structure` requires equal lengths."""
    if isinstance(value, dict):
        return {key: _fix_lengths(each) for key, each in value.items()}
    return tuple(map(_fix_lengths, value)) if isinstance(value, list) else value


def _adapt_schedule_state(
    saved: Mapping[str, Any], own: dict[str, Any], applied_steps: int
) -> dict[str, Any]:
    """Return a saved scheduler state adapted to the schedule of this run.

    A schedule without feedback continues at step ``applied_steps``. A feedback schedule continues
    from its saved state if the saved schedule has the same type and params. Otherwise, a feedback
    schedule keeps its current state.

    Args:
        saved: scheduler state in the checkpoint; can be empty.
        own: current state of this run's scheduler.
        applied_steps: step at which a schedule without feedback continues.
    """
    state = own | {"step": applied_steps}
    if "state" in own:
        if all(saved.get(name) == own[name] for name in ("type", "params")):
            state |= {"state": saved["state"], "step": saved["step"]}
        else:
            log.warning(
                "the checkpoint has no state that matches the type and params of the schedule %s "
                "in this config; starting the schedule at step %d",
                own["type"],
                own["step"],
            )
            state["step"] = own["step"]
    return state


def advance(scheduler: LRScheduler, applied_steps: int) -> None:
    """Step a PyTorch scheduler until it reaches the current step of the run.

    Unlike a `ScheduleBinder`, a PyTorch scheduler cannot jump to a step, and loading its saved
    state would also restore the settings of the saved run.

    Args:
        scheduler: scheduler of this run.
        applied_steps: number of optimizer steps that the run has applied so far.
    """
    if isinstance(scheduler, ReduceLROnPlateau) or not hasattr(scheduler, "last_epoch"):
        log.warning(
            "%s restarts from step 0, because its step in the saved run is unknown",
            type(scheduler).__name__,
        )
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for _ in range(applied_steps - scheduler.last_epoch):
            scheduler.step()

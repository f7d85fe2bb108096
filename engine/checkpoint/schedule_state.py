"""Adapt the saved state of a scheduler to a run whose schedule or batch size is different."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from engine.checkpoint.structure import check_same_structure
from engine.config import Config
from schedules import ScheduleBinder
from schedules.core.durations import has_data_durations

__all__ = ["adapt_schedule_state", "check_schedule_state", "convert_position"]

log = logging.getLogger("onecycle")


def convert_position(steps: int, config: Config, saved_batch: Mapping[str, int]) -> int:
    """Return the step at which a schedule continues after a change of the batch size.

    If the schedule has durations in samples, epochs or fractions of the run, a larger batch makes
    it shorter in steps, so the schedule continues after the same number of samples.

    Args:
        steps: number of applied optimizer steps in the checkpoint.
        config: config of this run.
        saved_batch: batch sizes in the checkpoint.
    """
    train, schedule = config.batch.train, config.schedule
    saved_train = saved_batch.get("train", train)
    if saved_train == train or schedule is None or not has_data_durations(schedule):
        return steps
    return round(steps * saved_train / train)


def check_schedule_state(scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Check that a scheduler can continue from a state. Nothing changes.

    Raises:
        Exception: the state is damaged, or does not match the scheduler.
    """
    if isinstance(scheduler, ScheduleBinder):
        scheduler.check_state_dict(state)
        return
    own = copy.deepcopy(scheduler.state_dict())
    check_same_structure(state, own, "lr_scheduler")
    try:
        scheduler.load_state_dict(copy.deepcopy(state))
    finally:
        scheduler.load_state_dict(own)


def adapt_schedule_state(
    saved: Mapping[str, Any], own: dict[str, Any], applied_steps: int
) -> dict[str, Any]:
    """Adapt a saved scheduler state to this run's schedule, which may be a different one.

    A schedule without feedback continues at the current step of the run. A feedback schedule
    depends on past losses, so it restarts unless its type and params match the saved ones.

    Args:
        saved: scheduler state in the checkpoint; empty if the checkpoint contains none.
        own: current state of this run's scheduler.
        applied_steps: step at which the schedule continues.
    """
    state = own | {"step": applied_steps}
    if "state" in own:
        if all(saved.get(name) == own[name] for name in ("type", "params")):
            state |= {"state": saved["state"], "step": saved["step"]}
        else:
            log.warning(
                "%s depends on past losses that this checkpoint does not contain; "
                "restarting the schedule",
                own["type"],
            )
            state["step"] = own["step"]
    return state

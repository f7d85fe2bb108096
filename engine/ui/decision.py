"""Use a run's recorded losses to recompute AutoWU's decision to end the warmup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.ui.metrics import Series
from schedules.core.imports import imports_allowed
from schedules.core.registry import from_config
from schedules.core.trace import complete_base, replay

__all__ = ["recompute_decision"]

_NAME = "AutoWU"
_MAX_STEPS = 20_000


def recompute_decision(
    settings: Mapping[str, Any], series: Mapping[str, Series]
) -> dict[str, Any] | None:
    """Return AutoWU's decision to end the warmup, with the losses that led to it.

    Args:
        settings: config of the run, or the settings saved in one of its checkpoints.
        series: metrics of the run.

    Returns:
        The decision as a JSON-compatible dict; None if the run does not use AutoWU, is still in
        its warmup, or lacks the data to recompute the decision.
    """
    block = settings.get("scheduler")
    losses = series.get("train_loss")
    if not isinstance(block, Mapping) or block.get("type") != _NAME or losses is None:
        return None
    values = losses.values[:_MAX_STEPS]
    if not np.isfinite(values).all():  # the schedule has not seen the losses of skipped steps
        values = values[np.isfinite(values)]
    try:
        with imports_allowed(False):
            schedule = from_config({"type": _NAME, "params": dict(block.get("params", {}))})
            evidence = replay(schedule, values.tolist(), base=_read_base(settings)).evidence
    except (ValueError, TypeError):
        return None
    if evidence is None:
        return None
    band = evidence.band
    return {
        "step": evidence.decision.step,
        "lr": evidence.decision.lr,
        "reason": evidence.decision.reason,
        "probability": evidence.decision.probability,
        "losses": list(evidence.losses),
        "band": None
        if band is None
        else {key: list(map(float, part)) for key, part in band._asdict().items()},
    }


def _read_base(settings: Mapping[str, Any]) -> Any:
    optimizer = settings.get("optimizer")
    params = optimizer.get("params", {}) if isinstance(optimizer, Mapping) else {}
    lr = params.get("lr") if isinstance(params, Mapping) else None
    return complete_base({"lr": lr} if isinstance(lr, int | float) else None)

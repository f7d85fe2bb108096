"""The run that a config's durations are a part of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from schedules import Horizon
from schedules.core.durations import DurationError, steps_of

__all__ = ["horizon_of"]


def horizon_of(
    engine: Mapping[str, Any], *, samples_per_step: int | None, steps_per_epoch: float | None
) -> Horizon:
    """Return the horizon of a config's section ``engine``.

    Args:
        engine: the section, with or without its defaults.
        samples_per_step: ``train_batch_size``, where it is known.
        steps_per_epoch: optimizer updates in one pass over the data, where it is known.

    Raises:
        DurationError: ``max_duration`` is in epochs, and their length is not known.

    >>> horizon_of({"max_duration": "2ep"}, samples_per_step=8, steps_per_epoch=50).total_steps
    100
    """
    known = Horizon(samples_per_step=samples_per_step, steps_per_epoch=steps_per_epoch)
    length = engine.get("max_duration")
    total = None
    if length is not None:
        try:
            total = steps_of(length, known, scaled=False)
        except DurationError as error:
            raise DurationError(f"`engine.max_duration`: {error}") from None
    return Horizon(
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        samples_per_step=samples_per_step,
        scale_ratio=engine.get("scale_schedule_ratio", 1.0),
        scale_warmup=engine.get("scale_warmup", False),
        counts_samples=isinstance(length, str) and length.strip().lower().endswith("sp"),
    )

"""Durations: counts of steps, or Composer's time strings, and the run that they are a part of.

A string is a number and a unit: ``"10ep"`` epochs, ``"500ba"`` batches (optimizer updates),
``"4096sp"`` samples, ``"0.1dur"`` a share of the run. They become steps against a `Horizon`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

__all__ = ["PATTERN", "DurationError", "FractionalSteps", "Horizon", "is_unresolved", "steps_of"]

PATTERN = r"^\s*[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?\s*([eE][pP]|[bB][aA]|[sS][pP]|[dD][uU][rR])\s*$"
_TIME = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]+)\s*")
_WHOLE = ("ep", "ba", "sp")


class DurationError(ValueError):
    """A duration that cannot become steps here; the message says what is missing.

    ValueError
    └── DurationError
    """


class FractionalSteps(float):
    """A duration that was resolved and ends between two updates, as 6 samples of 4 an update."""


@dataclasses.dataclass(frozen=True)
class Horizon:
    """The run that durations are a part of.

    Args:
        total_steps: length of the run in optimizer updates, as configured: before it is scaled.
        steps_per_epoch: optimizer updates in one pass over the data.
        samples_per_step: samples that one update sees (``train_batch_size``).
        scale_ratio: the scale schedule ratio: how many times as long the run is to be.
        scale_warmup: whether warmups are scaled too.
        counts_samples: whether the length of the run was given in samples. Shares of it are whole
            samples then, not whole updates.

    Raises:
        ValueError: a number is not positive.

    >>> Horizon(total_steps=60, scale_ratio=0.5).scaled_steps
    30
    """

    total_steps: float | None = None
    steps_per_epoch: float | None = None
    samples_per_step: float | None = None
    scale_ratio: float = 1.0
    scale_warmup: bool = False
    counts_samples: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[:4]:
            value = getattr(self, field.name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(
                    f"`{field.name}` must be a positive number, but is {value} instead."
                )

    @property
    def scaled_steps(self) -> float | None:
        """Length of the run after scaling; whole where the configured length is."""
        if self.total_steps is None:
            return None
        if self.counts_samples and self.samples_per_step:
            samples = int(round(self.total_steps * self.samples_per_step) * self.scale_ratio)
            return _whole(samples / self.samples_per_step)
        return int(self.total_steps * self.scale_ratio)


def is_unresolved(value: Any) -> bool:
    """Return whether a field's value is a time string."""
    return isinstance(value, str) and _TIME.fullmatch(value) is not None


def steps_of(duration: float | str, horizon: Horizon, *, scaled: bool) -> float:
    """Return a duration in optimizer updates.

    Whole counts stay whole by truncation, as in Composer; samples may end between two updates.

    Args:
        duration: a count of updates, or a time string.
        horizon: the run.
        scaled: whether the scale schedule ratio applies. A share of the run (``dur``) is one of
            the scaled run in any case.

    Raises:
        DurationError: the horizon lacks what the unit needs, or the unit is none of ours.

    >>> steps_of("0.29dur", Horizon(total_steps=100), scaled=True)
    28
    >>> steps_of("6sp", Horizon(samples_per_step=4), scaled=True)
    1.5
    """
    ratio = horizon.scale_ratio if scaled else 1.0
    if not isinstance(duration, str):
        return _whole(duration * ratio, duration)
    value, unit = _parse(duration)
    if unit == "dur":
        if horizon.scaled_steps is None:
            raise DurationError(
                f"{duration!r} needs the length of the run: "
                'give it, as "engine": {"max_duration": "10ep"} in a config or '
                "horizon=Horizon(total_steps=…) in a loop of your own, or write a count of updates."
            )
        return _share(value, horizon)
    if unit == "ep":
        if horizon.steps_per_epoch is None:
            raise DurationError(
                f"{duration!r} needs the length of an epoch: give `training_data` to initialize, "
                "--steps-per-epoch to the command, or write a count of updates."
            )
        return int(int(value * horizon.steps_per_epoch) * ratio)
    if unit == "sp":
        if horizon.samples_per_step is None:
            raise DurationError(
                f"{duration!r} needs the number of samples in an update: "
                'give "train_batch_size", or write a count of updates.'
            )
        return _whole(int(value * ratio) / horizon.samples_per_step)
    return int(value * ratio)


def _share(value: float, horizon: Horizon) -> float:
    total = horizon.scaled_steps
    assert total is not None
    if horizon.counts_samples and horizon.samples_per_step:
        samples = round(total * horizon.samples_per_step)
        return _whole(int(value * samples) / horizon.samples_per_step)
    return int(value * total)


def _parse(text: str) -> tuple[float, str]:
    match = _TIME.fullmatch(text)
    unit = match[2].lower() if match else ""
    if unit == "tok":
        raise DurationError(
            f"{text!r} counts tokens, which vary from batch to batch and are known to the model "
            "alone: a schedule of them would not be a function of the update. Write ba or dur."
        )
    if match is None or unit not in (*_WHOLE, "dur"):
        raise DurationError(
            f"a duration must be a count of updates or a string in ep, ba, sp or dur, as "
            f'"10ep" or "0.1dur", but is {text!r} instead.'
        )
    value = float(match[1])
    if unit != "dur" and value != int(value):
        raise DurationError(f"{text!r} must be whole: only a share of the run (dur) is not.")
    return value, unit


def _whole(scaled: float, configured: float | None = None) -> float:
    """Truncate what was configured as a whole number; write a whole float as an int."""
    if configured is not None and float(configured).is_integer():
        return int(scaled)
    return int(scaled) if float(scaled).is_integer() else FractionalSteps(scaled)

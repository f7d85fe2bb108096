"""Convert durations to optimizer steps. A duration is a number of steps or a time string.

Time strings have Composer's format: a number followed by a unit. ``"10ep"`` is 10 epochs,
``"500ba"`` is 500 batches (optimizer steps), ``"4096sp"`` is 4096 samples, ``"1e9tok"`` is a
billion tokens, and ``"0.1dur"`` is a tenth of the run. All units except ``ba`` are
converted with numbers from a `Horizon`, such as the number of steps per epoch.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = [
    "MAX_STEPS",
    "PATTERN",
    "DurationError",
    "FractionalSteps",
    "Horizon",
    "convert_to_steps",
    "get_unit",
    "has_data_durations",
    "is_time_string",
    "list_examples",
    "suggest_duration",
]

_UNIT = "[eE][pP]|[bB][aA]|[sS][pP]|[tT][oO][kK]|[dD][uU][rR]"
PATTERN = rf"^\s*[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?\s*({_UNIT})\s*$"
_TIME = re.compile(r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]+)\s*")
_WHOLE = ("ep", "ba", "sp", "tok")
_EXAMPLES = {
    "200ba": "steps",
    "10ep": "epochs",
    "4096sp": "samples",
    "1e9tok": "tokens",
    "0.1dur": "fraction of the run",
}
_WORDS = {
    "step": "ba",
    "batch": "ba",
    "iter": "ba",
    "iteration": "ba",
    "epoch": "ep",
    "sample": "sp",
    "token": "tok",
}

MAX_STEPS = 2**53
"""Maximum number of steps in a run or duration. Floats represent integers up to 2**53 exactly."""


_POSITIVE = (
    "total_steps",
    "steps_per_epoch",
    "samples_per_step",
    "scale_ratio",
    "tokens_per_sample",
)
"""Fields of `Horizon` that must be positive."""


class DurationError(ValueError):
    """Raised when a duration is invalid or cannot be converted to steps.

    ValueError
    └── DurationError
    """


class FractionalSteps(float):
    """Fractional number of steps, such as 1.5 steps for 6 samples at 4 samples per step."""


@dataclasses.dataclass(frozen=True)
class Horizon:
    """The length of a run, and the other numbers that are needed to convert time strings to steps.

    Args:
        total_steps: length of the run in optimizer steps, before scaling by ``scale_ratio``.
        steps_per_epoch: number of optimizer steps in one pass over the data.
        samples_per_step: number of samples in one optimizer step (``train_batch_size``).
        scale_ratio: factor by which the length of the run and the schedule's durations are
            multiplied (``scale_schedule_ratio`` in Composer).
        scale_warmup: whether ``scale_ratio`` also applies to warmups.
        counts_samples: whether the length of the run was specified in samples or tokens. If so, a
            fraction of the run is rounded down to whole samples instead of whole steps.
        tokens_per_sample: number of tokens in each sample, such as the length of packed sequences.

    Raises:
        ValueError: a number is zero, negative, infinite or NaN, or the length of the run exceeds
            `MAX_STEPS`.

    >>> Horizon(total_steps=60, scale_ratio=0.5).scaled_steps
    30
    """

    total_steps: float | None = None
    steps_per_epoch: float | None = None
    samples_per_step: float | None = None
    scale_ratio: float = 1.0
    scale_warmup: bool = False
    counts_samples: bool = False
    tokens_per_sample: float | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        if self.total_steps is not None:
            samples = (self.samples_per_step or 1) if self.counts_samples else 1
            _check_length(
                self.total_steps * samples * max(1.0, self.scale_ratio), "The length of the run"
            )

    @property
    def scaled_steps(self) -> float | None:
        """Length of the run in optimizer steps, multiplied by ``scale_ratio``."""
        if self.total_steps is None:
            return None
        if self.counts_samples and self.samples_per_step:
            samples = int(round(self.total_steps * self.samples_per_step) * self.scale_ratio)
            return _to_steps(samples / self.samples_per_step)
        return int(self.total_steps * self.scale_ratio)


def is_time_string(value: Any) -> bool:
    """Return whether a value is a time string, such as ``"10ep"``."""
    return get_unit(value) is not None


def get_unit(value: Any) -> str | None:
    """Return the lowercase unit of a time string; None if the value is not a time string.

    >>> get_unit("500BA"), get_unit(500)
    ('ba', None)
    """
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    return match[2].lower() if match else None


def list_examples(pattern: str = PATTERN) -> str:
    """Return an example of a time string for each unit that a regular expression accepts.

    >>> list_examples("ep|ba")
    '"200ba" (steps) or "10ep" (epochs)'
    """
    *most, last = (f'"{e}" ({unit})' for e, unit in _EXAMPLES.items() if re.search(pattern, e))
    return f"{', '.join(most)} or {last}" if most else last


def suggest_duration(text: str) -> int | str | None:
    """Suggest a valid duration for a text such as "200 steps"; return None if there is none.

    >>> suggest_duration("200 steps"), suggest_duration("10 Epochs"), suggest_duration("2 weeks")
    (200, '10ep', None)
    """
    match = _TIME.fullmatch(text)
    word = match[2].lower() if match else ""
    unit = (
        _WORDS.get(word)
        or _WORDS.get(word.removesuffix("s"))
        or _WORDS.get(word.removesuffix("es"))
    )
    if match is None or unit is None or not float(match[1]).is_integer():
        return None
    return int(float(match[1])) if unit == "ba" else match[1] + unit


def convert_to_steps(duration: float | str, horizon: Horizon, *, scaled: bool) -> float:
    """Convert a duration to optimizer steps.

    A time string in samples or tokens can result in a fractional number of steps, and so can a
    fraction of the run (``dur``) if ``horizon.counts_samples`` is true. All other time strings are
    truncated to whole steps, as in Composer.

    Args:
        duration: number of steps, or a time string.
        horizon: length of the run and the other numbers needed for the conversion.
        scaled: whether to multiply the duration by ``horizon.scale_ratio``. A fraction of the run
            (``dur``) is always scaled.

    Raises:
        DurationError: the time string is invalid, a number that its unit requires is not set in
            ``horizon``, or the result exceeds `MAX_STEPS`.

    >>> convert_to_steps("0.29dur", Horizon(total_steps=100), scaled=True)
    28
    >>> convert_to_steps("6sp", Horizon(samples_per_step=4), scaled=True)
    1.5
    >>> convert_to_steps("64tok", Horizon(samples_per_step=4, tokens_per_sample=8), scaled=True)
    2
    """
    ratio = horizon.scale_ratio if scaled else 1.0
    if not isinstance(duration, str):
        return _to_steps(_check_length(duration, "A duration") * ratio, duration)
    value, unit = _parse(duration)
    if unit == "dur":
        if horizon.scaled_steps is None:
            raise DurationError(
                f"{duration!r} requires the length of the run. "
                'Set "engine": {"max_duration": "10ep"} in the config, or specify the duration in '
                "steps. In a loop without the engine, pass horizon=Horizon(total_steps=…)."
            )
        return _convert_fraction(value, horizon, repr(duration))
    if unit == "ep":
        if horizon.steps_per_epoch is None:
            raise DurationError(
                f"{duration!r} requires the number of steps per epoch. On the command line, use "
                "`--steps-per-epoch` with the number of samples divided by `train_batch_size`. In "
                "a script, pass `training_data` (a dataset or a data loader) to `initialize`. Or "
                "specify the duration in steps. In a loop without the engine, pass "
                "horizon=Horizon(steps_per_epoch=…)."
            )
        steps = int(_check_length(value * horizon.steps_per_epoch, repr(duration)))
        return int(_check_length(steps * ratio, repr(duration)))
    if unit in ("sp", "tok"):
        per_step = _count_per_step(unit, horizon, repr(duration))
        return _to_steps(int(_check_length(value * ratio, repr(duration))) / per_step)
    return int(_check_length(value * ratio, repr(duration)))


def _count_per_step(unit: str, horizon: Horizon, text: str) -> float:
    """Return the number of samples (unit ``sp``) or tokens (unit ``tok``) in an optimizer step."""
    if unit == "tok" and horizon.tokens_per_sample is None:
        raise DurationError(
            f"{text} requires the number of tokens per sample, which must be the same for all "
            'samples. Set it in the config, for example "engine": {"tokens_per_sample": 2048}, or '
            'specify the duration in steps ("500ba"). In a loop without the engine, pass '
            "horizon=Horizon(samples_per_step=…, tokens_per_sample=…)."
        )
    if horizon.samples_per_step is None:
        raise DurationError(
            f"{text} requires the number of samples per step. Set `train_batch_size`, or specify "
            "the duration in steps. In a loop without the engine, pass "
            "horizon=Horizon(samples_per_step=…)."
        )
    tokens = (horizon.tokens_per_sample or 1) if unit == "tok" else 1
    return horizon.samples_per_step * tokens


def has_data_durations(schedule: Any) -> bool:
    """Return whether a schedule has a duration in epochs, samples, tokens or fractions of the run.

    Durations in lists and in nested schedules are included.

    >>> from schedules import MultiStepScheduler, WarmupDecayLR
    >>> has_data_durations(WarmupDecayLR(total_num_steps="10ep"))
    True
    >>> has_data_durations(WarmupDecayLR(total_num_steps=2000))
    False
    >>> has_data_durations(MultiStepScheduler(milestones=["10ep", 2000]))
    True
    """
    if dataclasses.is_dataclass(schedule):
        return any(
            has_data_durations(getattr(schedule, field.name))
            for field in dataclasses.fields(schedule)
        )
    if isinstance(schedule, Mapping):
        return any(map(has_data_durations, schedule.values()))
    if isinstance(schedule, list | tuple):
        return any(map(has_data_durations, schedule))
    return get_unit(schedule) in {"ep", "sp", "tok", "dur"}


def _convert_fraction(value: float, horizon: Horizon, text: str) -> float:
    total = horizon.scaled_steps
    assert total is not None
    if horizon.counts_samples and horizon.samples_per_step:
        samples = round(total * horizon.samples_per_step)
        return _to_steps(int(_check_length(value * samples, text)) / horizon.samples_per_step)
    return int(_check_length(value * total, text))


def _parse(text: str) -> tuple[float, str]:
    match = _TIME.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in (*_WHOLE, "dur"):
        meant = suggest_duration(text)
        hint = f"Use {list_examples()}." if meant is None else f"Did you mean {json.dumps(meant)}?"
        raise DurationError(
            f"A duration must be a number of steps or a time string, got {text!r}. {hint}"
        )
    value = _check_length(float(match[1]), repr(text))
    if unit != "dur" and value != int(value):
        raise DurationError(
            f'{text!r} must contain a whole number. Only the unit "dur" accepts fractions.'
        )
    return value, unit


def _check_length(length: float, name: str) -> float:
    if not length <= MAX_STEPS:
        raise DurationError(f"{name} must be at most {MAX_STEPS:,} (2**53). Use a smaller value.")
    return length


def _to_steps(scaled: float, configured: float | None = None) -> float:
    """Convert a scaled duration to an int, or to `FractionalSteps` if it is not a whole number.

    If ``configured``, the duration before scaling, is a whole number, always truncate the scaled
    duration to an int.
    """
    _check_length(scaled, "A duration")
    if configured is not None and float(configured).is_integer():
        return int(scaled)
    return int(scaled) if float(scaled).is_integer() else FractionalSteps(scaled)

"""Compute a schedule's hyperparameter curves for a config's optimizer and run length."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config.batch_sizes import BATCH_KEYS, BatchError, DataRanks, derive_batch_sizes
from engine.config.schema import add_optimizer_defaults, is_import_path, optimizer_name
from schedules import Horizon, Schedule
from schedules.core.controller import Base, Curves
from schedules.core.durations import MAX_STEPS, DurationError, convert_to_steps
from schedules.core.pieces import find_next_step
from schedules.core.schedule import Joint

__all__ = [
    "END_HINT",
    "POSSIBLE_LENGTHS",
    "EndMismatch",
    "EvaluatedSchedule",
    "build_base_values",
    "build_horizon",
    "evaluate_schedule",
    "find_end_mismatch",
    "get_train_batch_size",
    "list_possible_horizons",
]

_MAX_PIECES = 5000
_JUMP = 0.01
"""Largest jump to ignore, as a fraction of the hyperparameter's maximum."""
_NEAR = 0.02  # fraction of the run; smaller differences between the two ends are ignored
_NEAR_ZERO = 0.01  # fraction of the peak; learning rates below it count as zero
END_HINT = 'Specify durations as fractions of the run, such as "1dur", or change `max_duration`.'
"""Advice if the ends of the schedule and of the run differ."""
POSSIBLE_LENGTHS = (1000, 1, 30, 1_000_000)
"""Values to try for an unknown number of steps per epoch or samples per step."""


def build_horizon(
    engine: Mapping[str, Any], *, samples_per_step: int | None, steps_per_epoch: float | None
) -> Horizon:
    """Return the run length that the ``engine`` section of a config sets.

    Args:
        engine: the ``engine`` section. Missing keys have their default values.
        samples_per_step: ``train_batch_size``; None if unknown.
        steps_per_epoch: number of optimizer steps per epoch; None if unknown.

    Raises:
        DurationError: the run is shorter than one step or too long, or a number that is needed to
            convert ``max_duration`` to steps is unknown.

    >>> build_horizon({"max_duration": "2ep"}, samples_per_step=8, steps_per_epoch=50).total_steps
    100
    """
    tokens = engine.get("tokens_per_sample")
    known = Horizon(
        samples_per_step=samples_per_step,
        steps_per_epoch=steps_per_epoch,
        tokens_per_sample=tokens,
    )
    length = engine.get("max_duration")
    total = None
    if length is not None:
        try:
            total = convert_to_steps(length, known, scaled=False)
        except DurationError as error:
            raise DurationError(f"`engine.max_duration`: {error}") from None
    ratio = engine.get("scale_schedule_ratio", 1.0)
    if total is not None and total * ratio < 1:
        scaled = "" if ratio == 1 else f" x `scale_schedule_ratio` ({ratio:g})"
        raise DurationError(
            f"`engine.max_duration`{scaled} must be at least 1 step, got {total * ratio:g} steps "
            f"(`max_duration` is {length!r}). Increase `engine.max_duration`."
        )
    return Horizon(
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        samples_per_step=samples_per_step,
        scale_ratio=ratio,
        scale_warmup=engine.get("scale_warmup", False),
        counts_samples=isinstance(length, str) and length.strip().lower().endswith(("sp", "tok")),
        tokens_per_sample=tokens,
    )


def list_possible_horizons(
    schedule: Schedule[Any],
    config: Mapping[str, Any],
    ranks: DataRanks | None,
    steps_per_epoch: int | None = None,
) -> list[Horizon]:
    """Return the possible horizons of a run.

    There are several horizons if a duration is in epochs, samples or tokens, and the number of
    steps per epoch or samples per step is unknown. Without ``train_batch_size``, the samples per
    step depend on the number of ranks. A caller should reject a config only if the config is
    invalid for every one of these horizons.

    Args:
        schedule: schedule whose durations will be converted to steps.
        config: config from which invalid values have been removed.
        ranks: number of data-parallel ranks; None if unknown.
        steps_per_epoch: number of optimizer steps per epoch; None if unknown.

    Raises:
        DurationError: every possible run length is less than one step, or too large.
    """
    run = config.get("engine", {})
    texts = f"{run.get('max_duration')} {list(vars(schedule).values())}".lower()
    samples = get_train_batch_size(config, ranks)
    epochs: tuple[int | None, ...] = (steps_per_epoch,)
    if steps_per_epoch is None and re.search(r"\d\s*ep\b", texts):
        epochs = POSSIBLE_LENGTHS
    batches: tuple[int | None, ...] = (samples,)
    if samples is None and re.search(r"\d\s*(sp|tok)\b", texts):
        batches = POSSIBLE_LENGTHS
    horizons, errors = [], []
    for steps, size in itertools.product(epochs, batches):
        try:
            horizons.append(build_horizon(run, samples_per_step=size, steps_per_epoch=steps))
        except DurationError as error:  # one error per length
            errors.append(error)
    if not horizons:
        raise errors[0]
    return horizons


def get_train_batch_size(config: Mapping[str, Any], ranks: DataRanks | None = None) -> int | None:
    """Return the number of samples per optimizer step, or None if it is unknown or invalid."""
    given = {key: config[key] for key in BATCH_KEYS if isinstance(config.get(key), int)}
    size = given.get(BATCH_KEYS[0])
    if size is None and ranks is not None:
        with contextlib.suppress(BatchError):
            size = derive_batch_sizes(given, ranks).train
    return size


def build_base_values(
    config: Mapping[str, Any],
    schedule: Schedule[Any],
    group: Mapping[str, Any] | None = None,
) -> Base:
    """Return the initial learning rate, momentum and weight decay of each param group.

    If the config has a custom optimizer or no ``optimizer`` block, missing values default to
    Adam's.

    Args:
        config: config without "auto" values.
        schedule: schedule of the config. If it contains lists with one value per param group, the
            number of groups is their length. Otherwise, there is one group.
        group: hyperparameters of a param group, which override those of the optimizer.
    """
    block = config.get("optimizer", {"type": "Adam"})
    name = optimizer_name(block["type"])
    assert name is not None
    known = "Adam" if is_import_path(name) else name
    named = config.get("engine", {}).get("backend", "auto")
    backend = "torch" if named == "torch" else "deepspeed"  # differs only if both have the name
    params = add_optimizer_defaults(known, block.get("params", {}), backend)
    params |= dict(group or {})
    momentum = params.get("momentum", params["betas"][0] if "betas" in params else 0.0)
    groups = schedule.num_groups or 1
    weight_decay = params.get("weight_decay", 0.0)
    base = {"lr": params["lr"], "momentum": momentum, "weight_decay": weight_decay}
    return {name: (value,) * groups for name, value in base.items()}


@dataclass(frozen=True)
class EvaluatedSchedule:
    """A schedule and its curves for a specific optimizer and run length."""

    configured: Schedule[Any]
    """The schedule as configured, before `resolve` converts and scales its durations."""
    schedule: Schedule[Any]
    """The schedule with its durations in steps, scaled by ``scale_schedule_ratio``."""
    horizon: Horizon
    base: Base
    curves: Curves

    def overwrites(self, name: str) -> bool:
        """Return whether the schedule sets a hyperparameter independently of its initial value.

        Args:
            name: hyperparameter to check, such as ``lr``.
        """
        if name not in self.curves:
            return False
        other = {**self.base, name: tuple(value / 2 or 0.5 for value in self.base[name])}
        changed = self.configured.build_curves(other, self.horizon)[name][0]
        steps = range(0, self.schedule.span + 1, max(1, self.schedule.span // 20))
        return all(self.curves[name][0](step) == changed(step) for step in steps)

    def get_range(self, name: str) -> tuple[float, float]:
        """Return the minimum and maximum of a hyperparameter over the schedule.

        Only the first param group is considered. To save time, each piece of its curve, such as the
        warmup, is evaluated only at its first and last step.
        """
        if name not in self._ranges:
            curve = self.curves[name][0]
            span = max(int(self.schedule.span), 1)
            pieces = itertools.islice(curve.pieces(0, span + 1), _MAX_PIECES)
            values = [value for p in pieces for value in (p.formula(p.start), p.formula(p.end - 1))]
            self._ranges[name] = min(values), max(values)
        return self._ranges[name]

    @functools.cached_property
    def _ranges(self) -> dict[str, tuple[float, float]]:
        """Cached results of `get_range`, by hyperparameter."""
        return {}

    def find_infinite(self) -> tuple[str, int, float] | None:
        """Find a non-finite value in the run, and return ``(hyperparameter, step, value)``.

        If no such value is found, return None. To save time, each piece of a curve, such as the
        warmup, is evaluated only at its first and last step.
        """
        steps = int(self.horizon.scaled_steps or self.schedule.span)
        for name, curves in self.curves.items():
            for curve in set(curves):
                for piece in itertools.islice(curve.pieces(0, steps + 1), _MAX_PIECES):
                    for step in (int(piece.start), int(piece.end) - 1):
                        if not math.isfinite(value := piece.formula(step)):
                            return name, step, value
        return None

    def find_jumps(self) -> Iterator[tuple[Joint, float, float]]:
        """Yield each jump in a hyperparameter between two phases of the schedule.

        Yields:
            The `Joint` at which the jump occurs, and the hyperparameter's values at that step in
            the earlier phase and in the later phase. If several param groups have a jump there,
            only the first of them is reported.
        """
        largest = {name: self.get_range(name)[1] for name in self.curves}
        for joint in self.schedule.joints():
            step = math.ceil(joint.step)
            for curve in self.curves[joint.hyperparameter]:
                before, after = curve.piece(max(0, step - 1)).formula(step), curve(step)
                if step > 0 and abs(after - before) > _JUMP * largest[joint.hyperparameter]:
                    yield joint, before, after
                    break

    @property
    def end(self) -> int | None:
        """Step from which the learning rate stays constant; None if there is no such step."""
        if "lr" not in self.curves:
            return None
        curve, step = self.curves["lr"][0], 0
        for _ in range(_MAX_PIECES):
            piece = curve.piece(step)
            if math.isinf(piece.end):
                is_constant = piece.line is not None and piece.line.rise == 0
                return max(0, math.ceil(piece.start)) if is_constant else None
            step = find_next_step(piece, step, MAX_STEPS)
            if step == MAX_STEPS:
                return None
        return None

    def find_end_mismatch(self) -> EndMismatch | None:
        """Compare the end of the schedule with the end of the run.

        Return None if the difference is small or does not change the learning rate, or if one of
        the ends is unknown.
        """
        if self.horizon.scaled_steps is None or (end := self.end) is None:
            return None
        total = int(self.horizon.scaled_steps)
        # The last step of the run is step `total - 1`, which can already have the final value.
        if end == total - 1 or abs(end - total) <= _NEAR * total:
            return None
        curve, peak = self.curves["lr"][0], self.get_range("lr")[1]
        found = EndMismatch(total, end, last=curve(total), final=curve(end), peak=peak)
        is_noticeable = found.last != found.final if found.is_cut else found.final < peak
        return found if is_noticeable else None


@dataclass(frozen=True)
class EndMismatch:
    """A noticeable difference between the end of a schedule and the end of the run."""

    run: int
    """Length of the run in optimizer steps."""
    schedule: int
    """Step from which the learning rate stays constant."""
    last: float
    """Learning rate at the end of the run."""
    final: float
    """Learning rate at the end of the schedule."""
    peak: float
    """Maximum learning rate of the schedule."""

    @property
    def is_cut(self) -> bool:
        """Whether the run ends before the schedule."""
        return self.schedule > self.run

    @property
    def is_harmful(self) -> bool:
        """Whether the run ends before the schedule, or continues with a rate of almost zero."""
        return self.is_cut or self.final <= _NEAR_ZERO * self.peak

    def describe(self, *, in_steps: bool) -> str:
        """Return a message that compares the two ends, in steps or in percent."""
        if self.is_cut:
            place = f"The run ends after {self.run / self.schedule:.0%} of the schedule,"
            if in_steps:
                place = (
                    f"The schedule ends at step {self.schedule:,}, but the run ends at step "
                    f"{self.run:,}"
                )
            return f"{place} with a learning rate of {self.last:.3g} instead of {self.final:.3g}."
        place = f"The schedule ends after {self.schedule / self.run:.0%} of the run"
        if in_steps:
            place = f"The schedule ends at step {self.schedule:,} of {self.run:,}"
        return f"{place}. The learning rate then stays at {self.final:.3g}."


def find_end_mismatch(
    schedule: Schedule[Any], config: Mapping[str, Any], horizons: Iterable[Horizon]
) -> EndMismatch | None:
    """Compare the end of a schedule with the end of the run, for each possible horizon.

    Return the mismatch for the first horizon; None unless every horizon has a mismatch of the same
    kind.

    Raises:
        ValueError: the schedule is invalid for a horizon or the optimizer.
    """
    first = None
    for horizon in horizons:
        mismatch = evaluate_schedule(schedule, config, horizon).find_end_mismatch()
        first = first or mismatch
        if mismatch is None or first is None or mismatch.is_cut != first.is_cut:
            return None
    return first


def evaluate_schedule(
    schedule: Schedule[Any], config: Mapping[str, Any], horizon: Horizon
) -> EvaluatedSchedule:
    """Compute a schedule's curves for a config's optimizer and run length.

    Raises:
        ValueError: the schedule is invalid for this run length or optimizer.
    """
    base = build_base_values(config, schedule)
    curves = schedule.build_curves(base, horizon)
    return EvaluatedSchedule(schedule, schedule.resolve(horizon), horizon, base, curves)

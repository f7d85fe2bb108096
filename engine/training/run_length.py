"""Determine when a run ends, and when its checkpoints are due."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.config import Config
from engine.training.progress import Counters
from schedules.core.durations import DurationError, Horizon, convert_to_steps, get_unit

__all__ = ["RunLength"]


@dataclass
class RunLength:
    """Limits that determine when a run is over, and the interval between its checkpoints.

    >>> RunLength(steps_this_run=3).is_over(Counters(global_steps=3))
    True
    """

    steps_this_run: int | None = None
    """Maximum number of optimizer steps in this process; None for no limit."""
    total_steps: float | None = None
    """Length of the whole run in optimizer steps, including skipped steps; None if
    ``engine.max_duration`` is not given in steps."""
    total_samples: float | None = None
    """Length of the whole run in samples; None if ``engine.max_duration`` is not given in epochs,
    samples or tokens."""
    schedule_steps: int | None = None
    """Length of the schedule in steps, not counting skipped steps; None if the run does not end
    with the schedule."""
    steps_per_epoch: int | None = None
    """Number of optimizer steps per epoch; None if unknown."""
    checkpoint_interval: int | None = None
    """``engine.checkpoint.every`` in optimizer steps; None if it is not set or not yet known."""
    steps_before: int = 0
    """Number of optimizer steps that had been applied when the loaded checkpoint was saved; 0 if no
    checkpoint was loaded. `steps_this_run` does not count them."""
    is_position_known: bool = False
    """Whether the script has called `load_checkpoint` or read the engine's epoch or step count. If
    so, the script can resume at the right position."""

    def convert_durations(self, config: Config, steps_per_epoch: int | None) -> list[str]:
        """Convert ``engine.max_duration`` and ``engine.checkpoint.every``, if the config has them.

        Args:
            config: config of the run.
            steps_per_epoch: number of optimizer steps per epoch; None if unknown.

        Returns:
            The keys that are in epochs, and thus not converted, if ``steps_per_epoch`` is None.

        Raises:
            DurationError: a duration exceeds the supported maximum, or the run is shorter than one
                step.
        """
        self.steps_per_epoch = steps_per_epoch
        duration, every = config.run.get("max_duration"), config.checkpoint.every
        durations = {"engine.max_duration": duration, "engine.checkpoint.every": every}
        in_epochs = [key for key, value in durations.items() if get_unit(value) == "ep"]
        unknown = in_epochs if steps_per_epoch is None else []
        if "engine.max_duration" not in unknown:
            total = config.horizon(steps_per_epoch).scaled_steps
            if total is not None and get_unit(duration) not in {None, "ba"}:
                self.total_samples = total * config.batch.train
            else:
                self.total_steps = total
        if every is not None and "engine.checkpoint.every" not in unknown:
            known = Horizon(steps_per_epoch=steps_per_epoch, samples_per_step=config.batch.train)
            try:
                steps = convert_to_steps(every, known, scaled=False)
            except DurationError as error:
                raise DurationError(f"`engine.checkpoint.every`: {error}") from None
            self.checkpoint_interval = max(1, int(steps))
        return unknown

    def is_over(self, counters: Counters) -> bool:
        """Return whether the run has reached one of its limits."""
        if self.total_steps is not None and counters.global_steps >= self.total_steps:
            return True
        # Compare samples, because the number of batches changes with the batch size.
        if self.total_samples is not None and counters.global_samples >= self.total_samples:
            return True
        if self.schedule_steps is not None and counters.applied_steps >= self.schedule_steps:
            return True
        return self.is_session_over(counters)

    def find_last_step(self, counters: Counters, samples_per_step: int) -> float | None:
        """Return the step count at which the run will end, or None if that is unknown.

        >>> RunLength(total_samples=80).find_last_step(Counters(5, 5, 40), samples_per_step=10)
        9
        """
        ends = [self.total_steps] if self.total_steps is not None else []
        if self.total_samples is not None:
            left = math.ceil((self.total_samples - counters.global_samples) / samples_per_step)
            ends.append(counters.global_steps + left)
        if self.schedule_steps is not None:
            ends.append(self.schedule_steps + counters.skipped_steps)
        if self.steps_this_run is not None:
            ends.append(self.steps_before + self.steps_this_run + counters.skipped_steps)
        return min(ends, default=None)

    def is_session_over(self, counters: Counters) -> bool:
        """Return whether this process has taken `steps_this_run` steps."""
        limit = self.steps_this_run
        return limit is not None and counters.applied_steps - self.steps_before >= limit

    @property
    def is_known(self) -> bool:
        """Whether the length of the run is limited."""
        limits = (self.total_steps, self.total_samples, self.schedule_steps, self.steps_this_run)
        return any(limit is not None for limit in limits)

    @property
    def is_loop_limited(self) -> bool:
        """Whether a loop over epochs trains the correct number of epochs in a resumed run.

        If False, a loop such as ``for epoch in range(n)`` can start at epoch 0 again and train
        ``n`` more epochs.
        """
        return self.is_position_known or self.is_known

"""Statistical tests that end AutoWU's warmup when the loss has passed its minimum."""

from __future__ import annotations

import base64
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schedules.core.controller import Band
from schedules.feedback.autowu_state import AutoWUState, Warmup
from schedules.feedback.gaussian_process import Hyperparameters
from schedules.feedback.minimum_tests import (
    CONFIDENCE,
    compute_published_band,
    compute_robust_band,
    run_published_test,
    run_robust_test,
)

__all__ = ["PublishedTest", "RobustTest", "TorchSampler", "Verdict", "WarmupTest"]

_PATIENCE = 3  # The published test ends the warmup after this many positive results in a row.
_ROBUST_TESTS = 60  # The robust test runs this many times in a warmup of maximum length.
_SHORTEST = 90  # In a warmup with fewer steps, the robust test is rarely confident.


class Verdict(NamedTuple):
    """The result of one run of a `WarmupTest`."""

    state: AutoWUState
    """State of AutoWU after the test, including the new result."""
    ends_warmup: bool
    argmins: Sequence[float]
    """Estimates of the position of the loss minimum, from 0 (first loss) to 1 (latest loss)."""
    probability: float


class WarmupTest(ABC):
    """Base class of the statistical tests that check whether the loss has passed its minimum."""

    dtype: ClassVar[type]
    """Data type of the losses that `apply` receives."""
    cooldown_lead: ClassVar[int]
    """Number of values to skip at the start of the cooldown's learning rate curve."""
    enforces_cooldown: ClassVar[bool]
    """Whether ``cooldown_fraction`` also applies if ``immediate_cooldown`` is true."""

    def __init__(self, warmup: Warmup) -> None:
        self.warmup = warmup

    @property
    @abstractmethod
    def interval(self) -> int:
        """Number of training steps between runs of the test."""

    @abstractmethod
    def is_due(self, step: int) -> bool:
        """Return whether to run the test after the given training step."""

    @abstractmethod
    def apply(self, state: AutoWUState, losses: NDArray[Any]) -> Verdict:
        """Run the test on all losses of the warmup so far, and return its result."""

    @abstractmethod
    def find_likely_minimum(self, state: AutoWUState) -> float | None:
        """Return the likely position of the loss minimum; None if it is unknown.

        The position ranges from 0 (start of the warmup) to 1 (step of the latest test).
        """

    @abstractmethod
    def band(self, losses: NDArray[Any], state: AutoWUState) -> Band | None:
        """Return the mean and confidence band fitted to ``losses``.

        Return None if there is no fit yet.
        """

    @abstractmethod
    def warning(self) -> str | None:
        """Return a warning if the warmup is too short for the test; None if it is long enough."""


class PublishedTest(WarmupTest):
    """Test that checks whether the loss has passed its minimum, as in AutoWU's published code.

    The test runs once per epoch. The warmup ends when three consecutive runs find, with high
    confidence, that the loss has passed its minimum.
    """

    dtype = np.float32
    # In the published code, the cooldown is one step ahead: it skips the peak learning rate and
    # has a learning rate of 0 in its last step.
    cooldown_lead = 1
    enforces_cooldown = True

    @property
    def interval(self) -> int:
        return self.warmup.steps_per_epoch

    def is_due(self, step: int) -> bool:
        return step % self.interval == 0

    def apply(self, state: AutoWUState, losses: NDArray[Any]) -> Verdict:
        sampler = TorchSampler(state.draws)
        found = run_published_test(losses, state.fit or Hyperparameters.initial(), sampler.sample)
        votes = (*state.votes, found.is_positive)[-_PATIENCE:]
        state = dataclasses.replace(
            state, fit=found.fit, draws=sampler.state, votes=votes, chance=found.probability
        )
        return Verdict(state, sum(votes) >= _PATIENCE, found.argmins, found.probability)

    def find_likely_minimum(self, state: AutoWUState) -> None:
        del state

    def band(self, losses: NDArray[Any], state: AutoWUState) -> Band | None:
        return None if state.fit is None else compute_published_band(losses, state.fit)

    def warning(self) -> str | None:
        steps = self.warmup.steps
        if steps > _PATIENCE * self.interval:
            return None
        return (
            f"AutoWU's warmup of at most {steps} steps is shorter than {_PATIENCE + 1} epochs of "
            f"{self.interval} steps, so its test of the loss cannot end it. The warmup will end at "
            f"lr {self.warmup.lr(steps):.2g} or when the cooldown starts. Train for more epochs, "
            'or set "test": "robust".'
        )


class RobustTest(WarmupTest):
    """Test that checks whether the loss has passed its minimum, regardless of the loss's scale.

    The test runs about sixty times if the warmup reaches its maximum length. The warmup ends when
    enough consecutive runs (at least five) find, with high confidence, that the loss has passed its
    minimum.
    """

    dtype = np.float64
    cooldown_lead = 0
    enforces_cooldown = False

    @property
    def interval(self) -> int:
        return max(1, self.warmup.steps // _ROBUST_TESTS)

    def is_due(self, step: int) -> bool:
        return step % self.interval == 0 and step >= 2 * self.interval + 6

    def apply(self, state: AutoWUState, losses: NDArray[Any]) -> Verdict:
        found = run_robust_test(losses)
        lost = not np.isfinite(losses[-self.interval :]).any()
        votes = (*state.votes, True) if found.is_positive or lost else ()
        alone = state.alone + 1 if found.now > CONFIDENCE else 0
        state = dataclasses.replace(
            state, votes=votes, alone=alone, chance=found.now, argmin=found.argmin
        )
        patience = max(5, math.ceil(8 / self.interval))
        ends_warmup = len(votes) >= patience or alone >= 3 * patience
        return Verdict(state, ends_warmup, (found.argmin,), found.now)

    def find_likely_minimum(self, state: AutoWUState) -> float | None:
        return state.argmin if state.chance > 0.5 else None

    def band(self, losses: NDArray[Any], state: AutoWUState) -> Band:
        del state
        return compute_robust_band(losses)

    def warning(self) -> str | None:
        steps = self.warmup.steps
        if steps >= _SHORTEST:
            return None
        return (
            f"AutoWU's warmup of at most {steps} steps is short. With fewer than {_SHORTEST} steps,"
            " the test is rarely confident enough to end the warmup. Train for more steps."
        )


class TorchSampler:
    """Sampler that draws the same indices as AutoWU's published code, using a PyTorch generator.

    Args:
        state: the `state` attribute of an earlier sampler, to continue its sequence of random
            numbers; None to seed the generator with 0.
    """

    def __init__(self, state: str | None = None) -> None:
        self.state = state

    def sample(self, count: int, wanted: int) -> Any:
        """Return ``wanted`` distinct random indices from 0 to ``count - 1``, in ascending order."""
        import torch

        generator = self.build_generator()
        drawn = torch.ones(count).multinomial(wanted, generator=generator)
        self.state = base64.b64encode(generator.get_state().numpy().tobytes()).decode()
        return np.sort(drawn.numpy())

    def build_generator(self) -> Any:
        """Return a PyTorch generator with the saved `state`, or with seed 0 if `state` is None."""
        import torch

        generator = torch.Generator()
        if self.state is None:
            return generator.manual_seed(0)
        saved = bytearray(base64.b64decode(self.state))
        return generator.set_state(torch.frombuffer(saved, dtype=torch.uint8))

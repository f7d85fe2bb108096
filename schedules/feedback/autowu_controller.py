"""The controller of `AutoWU`, which decides when each phase of the schedule starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from schedules.core.controller import Band, Decision, Evidence, Values
from schedules.feedback.autowu_state import AutoWUState
from schedules.feedback.base import FeedbackController
from schedules.feedback.history import History
from schedules.feedback.plateau import Plateau
from schedules.feedback.warmup_tests import TorchSampler, WarmupTest

__all__ = ["AutoWUController", "Decay"]

_DECAY_PATIENCE = 5  # epochs without improvement


@dataclasses.dataclass(frozen=True)
class Decay:
    """Parameters of the phases after the warmup; see `schedules.AutoWU`."""

    cooldown_type: Literal["cosine", "half_cosine"]
    cooldown_start: float
    """Latest step at which the cooldown can start.

    If `is_immediate` is true, this step applies only with a test whose ``enforces_cooldown`` is
    true.
    """
    is_immediate: bool
    """Whether the cooldown starts right after the warmup, without a constant phase."""
    factor: float
    reduces_on_plateau: bool
    """Whether the learning rate is multiplied by `factor` at each plateau of the loss, instead of
    once after the warmup."""


class AutoWUController(FeedbackController[AutoWUState]):
    """Controller of `AutoWU` for param groups with the given initial learning rates.

    The first call to `update` counts as step 1, as in the AutoWU authors' implementation.

    Args:
        test: statistical test that ends the warmup. It also holds the warmup's parameters.
        decay: parameters of the phases after the warmup.
        total_steps: length of the run in steps.
        lrs: initial learning rate of each param group. Only the ratios to the first nonzero
            learning rate are used.
    """

    def __init__(
        self, test: WarmupTest, decay: Decay, total_steps: int, lrs: tuple[float, ...]
    ) -> None:
        self._test = test
        self._warmup = test.warmup
        self._decay = decay
        self._total = total_steps
        reference = next((lr for lr in lrs if lr), None)  # a group with 0 stays at 0
        self._ratios = tuple(1.0 if reference is None else lr / reference for lr in lrs)
        self._plateau = Plateau(decay.factor, _DECAY_PATIENCE)

    def init(self) -> AutoWUState:
        state = AutoWUState(decay=self._plateau.init())
        if self._warmup.steps > 0:
            return state
        state = dataclasses.replace(state, peak=self._warmup.max_lr)
        if not self._decay.is_immediate:
            return dataclasses.replace(state, phase="constant")
        return dataclasses.replace(state, phase="cooldown", begin=0, length=self._total)

    def values(self, state: AutoWUState) -> Values:
        lr = self._lr(state)
        return {"lr": tuple(lr * ratio for ratio in self._ratios)}

    def _lr(self, state: AutoWUState) -> float:
        if state.phase == "warmup":
            return self._warmup.lr(state.step)
        if state.phase == "constant":
            factor = state.decay.factor if state.decay and self._decay.reduces_on_plateau else 1.0
            return state.peak * factor
        done = min(state.step - state.begin, state.length)
        if not state.length:
            return state.peak
        if self._decay.cooldown_type == "cosine":
            return state.peak * (1 + math.cos(math.pi * done / state.length)) / 2
        return state.peak * (0.5 + 0.5 * math.cos(0.5 * math.pi * (1 + done / state.length)))

    def update(self, state: AutoWUState, loss: float | None) -> AutoWUState:
        if loss is None:
            raise ValueError(
                "AutoWU requires the loss at every step. Pass the loss to `step(loss=loss)` or, "
                "with the engine, to `trainer.backward(loss)`. If another library calls `step()` "
                "without the loss, call `scheduler.record_loss(loss)` before each of these calls."
            )
        state = dataclasses.replace(state, step=state.step + 1, is_lowest=False)
        if self._must_cool_down(state):
            lr = self._lr(dataclasses.replace(state, step=state.step - 1))
            if state.phase == "warmup":
                reason = "the cooldown started before the warmup had ended"
                state = _set_decision(state, lr, reason)
            return self._start_cooldown(state, lr)
        if state.phase == "warmup":
            return self._continue_warmup(state, loss)
        if state.phase == "constant" and self._decay.reduces_on_plateau:
            return self._update_plateau(state, loss)
        return state

    def _must_cool_down(self, state: AutoWUState) -> bool:
        return (
            state.step >= self._decay.cooldown_start
            and state.phase != "cooldown"
            and (self._test.enforces_cooldown or not self._decay.is_immediate)
        )

    def _start_cooldown(self, state: AutoWUState, peak: float) -> AutoWUState:
        return dataclasses.replace(
            state,
            phase="cooldown",
            peak=peak,
            begin=state.step - self._test.cooldown_lead,
            length=max(self._total - state.step, 0),
            losses=History(),
        )

    def _start_decay(self, state: AutoWUState, peak: float) -> AutoWUState:
        if self._decay.is_immediate:
            return self._start_cooldown(state, peak)
        return dataclasses.replace(state, phase="constant", peak=peak, losses=History())

    def _continue_warmup(self, state: AutoWUState, loss: float) -> AutoWUState:
        if state.step >= self._warmup.steps:
            return self._end_at_maximum(state)
        state = dataclasses.replace(state, losses=state.losses.with_loss(loss))
        if not self._test.is_due(state.step):
            return state
        losses = state.losses.array(self._test.dtype)
        verdict = self._test.apply(self._update_lowest(state, losses), losses)
        if not verdict.ends_warmup:
            return verdict.state
        lr = self._warmup.lr(state.step - 1)
        peaks = [self._warmup.lr_between(lr, argmin) for argmin in verdict.argmins]
        peak = sum(peaks) / len(peaks)
        reason = "the loss has passed its minimum"
        state = _set_decision(verdict.state, peak, reason, verdict.probability)
        state = self._start_decay(state, peak)
        if state.phase == "constant" and not self._decay.reduces_on_plateau:
            return dataclasses.replace(state, peak=peak * self._decay.factor)
        return state

    def _end_at_maximum(self, state: AutoWUState) -> AutoWUState:
        peak = self._warmup.lr(state.step - 1)
        reason = f"no minimum of the loss was found in {self._warmup.steps} steps of warmup"
        likely = self._test.find_likely_minimum(state)
        if likely is not None:
            peak = self._warmup.lr_between(peak, likely)
            reason += ", so its most likely position is used"
        return self._start_decay(_set_decision(state, peak, reason), peak)

    def _update_lowest(self, state: AutoWUState, losses: np.ndarray[Any, Any]) -> AutoWUState:
        mean = float(losses[-self._test.interval :].mean())
        if not mean < state.lowest:
            return state
        return dataclasses.replace(state, lowest=mean, is_lowest=True)

    def _update_plateau(self, state: AutoWUState, loss: float) -> AutoWUState:
        epoch = state.epoch.with_loss(loss)
        if len(epoch) < self._warmup.steps_per_epoch:
            return dataclasses.replace(state, epoch=epoch)
        assert state.decay is not None
        decay = self._plateau.update(state.decay, sum(epoch) / len(epoch))
        return dataclasses.replace(state, epoch=History(), decay=decay)

    def decision(self, state: AutoWUState) -> Decision | None:
        return state.decision

    def is_lowest(self, state: AutoWUState) -> bool:
        """Return whether the mean loss of the latest test interval is the lowest so far.

        Return False after steps at which the statistical test does not run.
        """
        return state.is_lowest

    def evidence(self, before: AutoWUState, loss: float, after: AutoWUState) -> Evidence | None:
        if after.decision is None:
            return None
        losses = before.losses.with_loss(loss).array(self._test.dtype)
        band: Band | None = None
        if np.isfinite(losses).any():
            band = self._test.band(losses, after)
        lrs = [self._warmup.lr(step) for step in range(losses.size)]
        return Evidence(after.decision, lrs, losses.tolist(), band)

    def to_json(self, state: AutoWUState) -> dict[str, Any]:
        return state.to_json()

    def from_json(self, state: Mapping[str, Any]) -> AutoWUState:
        restored = AutoWUState.from_json(state)
        if restored.phase == "warmup" and len(restored.losses) != restored.step:
            raise ValueError(
                f"`state.losses` must have {restored.step} items, one per warmup step, got "
                f"{len(restored.losses)}. Use another checkpoint."
            )
        if restored.decay is None:
            raise ValueError("`state.decay` must be a dict, got None. Use another checkpoint.")
        if restored.draws is not None:
            TorchSampler(restored.draws).build_generator()
        return restored


def _set_decision(
    state: AutoWUState, lr: float, reason: str, probability: float | None = None
) -> AutoWUState:
    decision = Decision(state.step, lr, reason, probability)
    return dataclasses.replace(state, decision=decision, is_lowest=False)

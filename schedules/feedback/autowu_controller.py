"""AutoWU at work: warmup, test, switch and decay, as a rule with an explicit state."""

from __future__ import annotations

import base64
import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from schedules.core.schedule import Values
from schedules.feedback.base import Band, Decision, Evidence, FeedbackController
from schedules.feedback.gaussian_process import Hyperparameters
from schedules.feedback.history import History
from schedules.feedback.minimum_tests import (
    CONFIDENCE,
    published_band,
    published_test,
    robust_band,
    robust_test,
)
from schedules.feedback.plateau import Plateau, PlateauState

if TYPE_CHECKING:
    from schedules.feedback.autowu import AutoWU

__all__ = ["AutoWURule", "AutoWUState"]

_PATIENCE = 3
_ROBUST_TESTS = 60  # a warmup
_SHORTEST = 90  # updates of warmup, below which a test is hardly ever sure
_DECAY_PATIENCE = 5  # epochs without a better loss


@dataclasses.dataclass(frozen=True)
class AutoWUState:
    """All that a run of AutoWU remembers."""

    step: int = 0
    phase: Literal["warmup", "constant", "cooldown"] = "warmup"
    losses: History = dataclasses.field(default_factory=History)
    """Of the warmup, in their order."""
    fit: Hyperparameters | None = None
    draws: str | None = None
    """State of the generator that draws losses, once it has drawn."""
    votes: tuple[bool, ...] = ()
    alone: int = 0
    """Robust tests in a row that were sure of the present alone."""
    chance: float = 0.0
    """Probability of the last test."""
    argmin: float = 1.0
    lowest: float = math.inf
    """Lowest mean loss between two tests."""
    is_lowest: bool = False
    peak: float = 0.0
    begin: int = 0
    length: int = 0
    decay: PlateauState | None = None
    epoch: tuple[float, ...] = ()
    """Losses of this epoch, where the constant phase looks at their mean."""
    decision: Decision | None = None


class AutoWURule(FeedbackController[AutoWUState]):
    """AutoWU at work; calls are counted from 1, as in the published code."""

    def __init__(self, params: AutoWU, lrs: tuple[float, ...]) -> None:
        self._params = params
        self._ratios = tuple(lr / lrs[0] if lrs[0] else 1.0 for lr in lrs)
        self._total = params.total_steps
        self._epoch = params.steps_per_epoch or 10
        self._warmup = int(params.max_warmup_fraction * self._total)
        self._robust = params.test == "robust"
        self._interval = max(1, self._warmup // _ROBUST_TESTS) if self._robust else self._epoch
        self._plateau = Plateau(params.decay_phase_factor, _DECAY_PATIENCE)

    def init(self) -> AutoWUState:
        state = AutoWUState(decay=self._plateau.init())
        if self._warmup > 0:
            return state
        whole = dataclasses.replace(state, peak=self._params.max_lr)
        if not self._params.immediate_cooldown:
            return dataclasses.replace(whole, phase="constant")
        return dataclasses.replace(whole, phase="cooldown", begin=0, length=self._total)

    def values(self, state: AutoWUState) -> Values:
        lr = self._lr(state)
        return {"lr": tuple(lr * ratio for ratio in self._ratios)}

    def _lr(self, state: AutoWUState) -> float:
        params = self._params
        if state.phase == "warmup":
            return self._warm(state.step)
        if state.phase == "constant":
            return state.peak * self._multiplier(state)
        done = min(state.step - state.begin, state.length)
        if not state.length:
            return state.peak
        if params.cooldown_type == "cosine":
            return state.peak * (1 + math.cos(math.pi * done / state.length)) / 2
        return state.peak * (0.5 + 0.5 * math.cos(0.5 * math.pi * (1 + done / state.length)))

    def _warm(self, step: int) -> float:
        params = self._params
        share = step / self._warmup
        if params.warmup_unit == "epoch":
            epochs = max(1, int(params.max_warmup_fraction * self._total / self._epoch + 1e-9))
            share = step // self._epoch / epochs
        if params.warmup_type == "linear":
            return params.min_lr + (params.max_lr - params.min_lr) * share
        return float(params.min_lr * (params.max_lr / params.min_lr) ** share)

    def _multiplier(self, state: AutoWUState) -> float:
        return state.decay.factor if state.decay and self._params.decay_phase_stat else 1.0

    def update(self, state: AutoWUState, loss: float | None) -> AutoWUState:
        if loss is None:
            raise ValueError(
                "AutoWU must be told the loss of each update, but was told none; call "
                "`step(loss=loss)`, or train through `engine.backward(loss)`."
            )
        call = state.step + 1
        state = dataclasses.replace(state, step=call, is_lowest=False)
        cools = call >= (1 - self._params.cooldown_fraction) * self._total
        if cools and state.phase != "cooldown" and not (self._robust and self._is_immediate):
            lr = self._lr(dataclasses.replace(state, step=call - 1))
            if state.phase == "warmup":
                state = self._decided(state, lr, "the cooldown begins, and the warmup was not over")
            return self._cool(state, lr)
        if state.phase == "warmup":
            return self._warm_up(state, loss)
        if state.phase == "constant" and self._params.decay_phase_stat == "loss":
            return self._watch(state, loss)
        return state

    @property
    def _is_immediate(self) -> bool:
        return self._params.immediate_cooldown

    def _cool(self, state: AutoWUState, peak: float) -> AutoWUState:
        # The published code is a step ahead: its peak is never used, and its last update has lr 0.
        begin = state.step - (0 if self._robust else 1)
        length = max(self._total - state.step, 0)
        return dataclasses.replace(
            state, phase="cooldown", peak=peak, begin=begin, length=length, losses=History()
        )

    def _decay(self, state: AutoWUState, peak: float) -> AutoWUState:
        if self._is_immediate:
            return self._cool(state, peak)
        return dataclasses.replace(state, phase="constant", peak=peak, losses=History())

    def _warm_up(self, state: AutoWUState, loss: float) -> AutoWUState:
        if state.step >= self._warmup:
            peak = self._warm(state.step - 1)
            why = f"no minimum was found in the {self._warmup} updates that the warmup may last"
            if self._robust and state.chance > 0.5:
                peak = self._at(peak, state.argmin)
                why += "; the likeliest was taken"
            return self._decay(self._decided(state, peak, why), peak)
        state = dataclasses.replace(state, losses=state.losses.with_loss(loss))
        if state.step % self._interval or (self._robust and state.step < 2 * self._interval + 6):
            return state
        return self._test_robustly(state) if self._robust else self._test_as_published(state)

    def _test_as_published(self, state: AutoWUState) -> AutoWUState:
        losses = state.losses.array(np.float32)
        generator = _Generator(state.draws)
        found = published_test(losses, state.fit or Hyperparameters.initial(), generator.draw)
        votes = (*state.votes, found.positive)[-_PATIENCE:]
        state = dataclasses.replace(
            self._noted(state, losses),
            fit=found.fit,
            draws=generator.state,
            votes=votes,
            chance=found.probability,
        )
        if sum(votes) < _PATIENCE:
            return state
        lr = self._warm(state.step - 1)
        peak = sum(self._at(lr, argmin) for argmin in found.argmins) / len(found.argmins)
        return self._found(state, peak, found.probability)

    def _test_robustly(self, state: AutoWUState) -> AutoWUState:
        losses = state.losses.array(np.float64)
        found = robust_test(losses)
        lost = not np.isfinite(losses[-self._interval :]).any()
        votes = (*state.votes, True) if found.positive or lost else ()
        alone = state.alone + 1 if found.now > CONFIDENCE else 0
        state = dataclasses.replace(
            self._noted(state, losses),
            votes=votes,
            alone=alone,
            chance=found.now,
            argmin=found.argmin,
        )
        patience = max(5, math.ceil(8 / self._interval))
        if len(votes) < patience and alone < 3 * patience:
            return state
        peak = self._at(self._warm(state.step - 1), found.argmin)
        return self._found(state, peak, found.now)

    def _found(self, state: AutoWUState, peak: float, probability: float) -> AutoWUState:
        state = self._decided(state, peak, "the loss has passed its minimum", probability)
        state = self._decay(state, peak)
        if state.phase == "constant" and self._params.decay_phase_stat is None:
            return dataclasses.replace(state, peak=peak * self._params.decay_phase_factor)
        return state

    def _noted(self, state: AutoWUState, losses: np.ndarray[Any, Any]) -> AutoWUState:
        mean = float(losses[-self._interval :].mean())
        if not mean < state.lowest:
            return state
        return dataclasses.replace(state, lowest=mean, is_lowest=True)

    def _at(self, lr: float, share: float) -> float:
        low = self._params.min_lr
        if self._params.warmup_type == "linear":
            return low + (lr - low) * share
        return float(low * (lr / low) ** share)

    def _decided(
        self, state: AutoWUState, lr: float, why: str, probability: float | None = None
    ) -> AutoWUState:
        decision = Decision(state.step, lr, why, probability)
        return dataclasses.replace(state, decision=decision, is_lowest=False)

    def _watch(self, state: AutoWUState, loss: float) -> AutoWUState:
        epoch = (*state.epoch, loss)
        if len(epoch) < self._epoch:
            return dataclasses.replace(state, epoch=epoch)
        assert state.decay is not None
        decay = self._plateau.update(state.decay, sum(epoch) / len(epoch))
        return dataclasses.replace(state, epoch=(), decay=decay)

    def decision(self, state: AutoWUState) -> Decision | None:
        return state.decision

    def lowest(self, state: AutoWUState) -> bool:
        return state.is_lowest

    def switched(self, state: AutoWUState) -> bool:
        return state.decision is not None and state.decision.step == state.step

    def evidence(self, before: AutoWUState, loss: float, after: AutoWUState) -> Evidence | None:
        if after.decision is None:
            return None
        losses = before.losses.with_loss(loss).array(np.float64 if self._robust else np.float32)
        band: Band | None = None
        if np.isfinite(losses).any():
            if self._robust:
                band = robust_band(losses)
            elif after.fit is not None:
                band = published_band(losses, after.fit)
        lrs = [self._warm(step) for step in range(losses.size)]
        return Evidence(after.decision, lrs, losses.tolist(), band)

    def warning(self) -> str | None:
        """Return what is wrong with a run like this one, if anything is."""
        if not self._robust and self._warmup <= _PATIENCE * self._epoch:
            return (
                f"AutoWU's warmup of at most {self._warmup} updates has no {_PATIENCE + 1} epochs "
                f"of {self._epoch}, so that no test can end it: it will end at "
                f"{self._warm(self._warmup):.2g} or before the cooldown. Train for more epochs, or "
                'set "test": "robust".'
            )
        if self._robust and self._warmup < _SHORTEST:
            return (
                f"AutoWU's warmup of at most {self._warmup} updates is short; tests are hardly "
                f"ever sure of fewer than {_SHORTEST} losses. Train for more updates."
            )
        return None

    def to_json(self, state: AutoWUState) -> dict[str, Any]:
        fields = {
            field.name: getattr(state, field.name) for field in dataclasses.fields(AutoWUState)
        }
        fields["losses"] = list(state.losses)
        fields["fit"] = state.fit and dataclasses.asdict(state.fit)
        fields["decay"] = state.decay and state.decay._asdict()
        fields["decision"] = state.decision and list(state.decision)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }

    def from_json(self, state: dict[str, Any]) -> AutoWUState:
        fit, decay, decision = state["fit"], state["decay"], state["decision"]
        return AutoWUState(
            **state
            | {
                "losses": History.of(state["losses"]),
                "votes": tuple(state["votes"]),
                "epoch": tuple(state["epoch"]),
                "fit": fit
                and Hyperparameters(
                    tuple(fit["raw"]), tuple(fit["first"]), tuple(fit["second"]), fit["steps"]
                ),
                "decay": decay and PlateauState(**decay),
                "decision": decision and Decision(*decision),
            }
        )


class _Generator:
    """Draws without replacement as the published code does: torch's generator, seeded with 0."""

    def __init__(self, state: str | None) -> None:
        self.state = state

    def draw(self, count: int, wanted: int) -> Any:
        """Return the sorted indices that are drawn."""
        import torch

        generator = torch.Generator()
        if self.state is None:
            generator.manual_seed(0)
        else:
            saved = bytearray(base64.b64decode(self.state))
            generator.set_state(torch.frombuffer(saved, dtype=torch.uint8))
        drawn = torch.ones(count).multinomial(wanted, generator=generator)
        self.state = base64.b64encode(generator.get_state().numpy().tobytes()).decode()
        return np.sort(drawn.numpy())

"""AutoWU, a schedule that ends its warmup automatically when the loss stops decreasing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Literal

from schedules.core.controller import Base
from schedules.core.durations import MAX_STEPS, Horizon
from schedules.core.fields import Range
from schedules.core.schedule import ParameterProblem, ScheduleError, schedule_class
from schedules.feedback.autowu_controller import AutoWUController, Decay
from schedules.feedback.autowu_state import AutoWUState, Warmup
from schedules.feedback.base import FeedbackSchedule
from schedules.feedback.warmup_tests import PublishedTest, RobustTest, WarmupTest

__all__ = ["AutoWU"]

Fraction = Annotated[float, Range(above=0, at_most=1)]
Count = Annotated[int | None, Range(at_least=1)]


@schedule_class
class AutoWU(FeedbackSchedule[AutoWUState], example={"steps_per_epoch": 10, "total_epochs": 10}):
    """Raise the learning rate until the loss has passed its minimum, then lower the learning rate.

    The warmup increases the learning rate exponentially from ``min_lr`` to ``max_lr``. Meanwhile, a
    Gaussian process fitted to the losses estimates the probability that the loss has passed its
    minimum. Several consecutive confident estimates (three with the default test) end the warmup.
    The learning rate then returns to its value at the minimum of the loss (``peak`` below). It
    stays constant until the cooldown at the end of the run. If ``immediate_cooldown`` is true, the
    cooldown starts right after the warmup::

        warmup    lr(k) = min_lr * (max_lr / min_lr) ** (k / W)
        cooldown  lr(k) = peak * (1 + cos(pi * n / D)) / 2   after n of D steps

    W is ``int(max_warmup_fraction * T)``, T is ``steps_per_epoch * total_epochs``, and D is the
    length of the cooldown. Without enough confident estimates, the warmup ends after W steps. After
    T steps, the learning rate stays constant. The formulas give the learning rate of the first
    param group. The learning rates of the other groups keep their initial ratios to that
    learning rate.

    The parameter ``test`` selects the statistical test that estimates the probability and ends the
    warmup. The test "reference" comes from the code of AutoWU's authors. It runs once per epoch,
    needs a run of about thirty epochs, and depends on the scale of the loss. The test "robust" runs
    about sixty times per warmup, does not depend on the scale of the loss, and tolerates loss
    spikes. With "robust", the cooldown starts at n = 0; with "reference", it starts at n = 1, as in
    the authors' code.

    If ``rollback`` is true, earlier weights and optimizer states are restored when the warmup ends.
    Each time the test runs, the weights and states are saved if the mean loss since the previous
    test is the lowest so far. A rollback helps models that diverge at high learning rates, such as
    models without normalization layers.

    The engine passes the loss of ``trainer.backward(loss)`` to the schedule. In a custom loop, call
    ``step(loss=loss)``. Previews use a synthetic loss.

    >>> import torch, schedules
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    >>> scheduler = schedules.attach("AutoWU", optimizer, steps_per_epoch=20, total_epochs=20)
    >>> for _ in range(400):
    ...     lr = scheduler.get_last_lr()[0]
    ...     scheduler.step(loss=1 + 0.3 * torch.tensor(lr / 0.01).log10() ** 2)
    >>> 0.007 < scheduler.decision.lr < 0.014
    True

    Source: Kim et al., https://arxiv.org/abs/2107.05855; github.com/kakaobrain/autowu.
    """

    steps_per_epoch: Count = None
    """Number of steps per epoch; null uses the run's actual number. If `test` is "reference", the
    statistical test runs once every `steps_per_epoch` steps."""
    total_epochs: Count = None
    """Number of epochs; null derives it from the length of the run."""
    min_lr: Annotated[float, Range(above=0)] = 1e-5
    """Learning rate at the first step."""
    max_lr: Annotated[float, Range(above=0)] = 1.0
    """Learning rate that the warmup reaches if it runs for its maximum length."""
    max_warmup_fraction: Annotated[float, Range(at_least=0, at_most=1)] = 0.5
    """Maximum length of the warmup as a fraction of the run."""
    warmup_unit: Literal["step", "epoch"] = "step"
    """Whether the warmup increases the learning rate at every step ("step") or at the end of every
    epoch ("epoch")."""
    warmup_type: Literal["exp", "linear"] = "exp"
    """Whether the learning rate increases exponentially or linearly during warmup."""
    immediate_cooldown: bool = False
    """Whether the cooldown starts immediately after the warmup, without a constant phase."""
    decay_phase_stat: Literal["loss"] | None = None
    """Statistic that triggers reductions of the learning rate between the warmup and the cooldown.
    With "loss", the learning rate is multiplied by `decay_phase_factor` each time the mean loss per
    epoch has not improved for more than five epochs. With null, the learning rate is reduced at
    most once, right after the warmup."""
    decay_phase_factor: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Factor applied to the learning rate between the warmup and the cooldown. If
    `decay_phase_stat` is "loss", the factor is applied at each plateau of the loss. If
    `decay_phase_stat` is null, the factor is applied once, right after the warmup, but only if the
    statistical test (see `test`) ended the warmup."""
    cooldown_fraction: Fraction = 0.2
    """Length of the cooldown at the end of the run, as a fraction of the run. A warmup still in
    progress ends when the cooldown starts. If `immediate_cooldown` is true, this value is
    the minimum length with the "reference" test, and has no effect with the "robust" test."""
    cooldown_type: Literal["cosine", "half_cosine"] = "cosine"
    """Shape of the cooldown; "half_cosine" starts at half of the peak learning rate."""
    test: Literal["reference", "robust"] = "reference"
    """Statistical test that decides when the warmup ends: the test from the code of AutoWU's
    authors ("reference"), or a test that does not depend on the scale of the loss ("robust")."""
    rollback: bool = False
    """Whether to restore earlier weights and optimizer states when the warmup ends. They are
    saved whenever the statistical test runs and the mean loss since its previous run is the lowest
    so far."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        if self.min_lr >= self.max_lr:
            message = (
                f"`min_lr` must be less than `max_lr` ({self.max_lr:g}), got {self.min_lr:g}. "
                "Reduce `min_lr` or increase `max_lr`."
            )
            yield ParameterProblem("min_lr", message)

    @property
    def total_steps(self) -> int:
        """Length of the run in steps.

        In previews, ``steps_per_epoch`` and ``total_epochs`` default to 10.
        """
        return (self.steps_per_epoch or 10) * (self.total_epochs or 10)

    @property
    def span(self) -> int:
        return self.total_steps

    def resolve(self, horizon: Horizon | None = None) -> AutoWU:
        """Return a copy with ``steps_per_epoch`` and ``total_epochs`` resolved for a run.

        If either parameter is null, it is computed from ``horizon`` if possible. The number of
        epochs, given or computed, is then multiplied by ``horizon.scale_ratio``. With the robust
        test, a run that does not consist of whole epochs is treated as a single epoch.

        Raises:
            ScheduleError: the scaled run has too many steps, or the schedule uses the reference
                test and the run does not consist of whole epochs.
        """
        if horizon is None:
            return self
        steps, epochs = self.steps_per_epoch, self.total_epochs
        in_an_epoch = steps or horizon.steps_per_epoch
        if steps is None and in_an_epoch:
            steps = max(1, int(in_an_epoch))
        if epochs is None and in_an_epoch and horizon.total_steps:
            epochs = max(1, round(horizon.total_steps / in_an_epoch))
            if abs(epochs * in_an_epoch - horizon.total_steps) >= 1:
                if self.test == "reference":
                    message = (
                        'With "test": "reference", the run must consist of whole epochs, got '
                        f"{horizon.total_steps:g} steps with {in_an_epoch:g} steps per epoch. "
                        "Set `steps_per_epoch` to a divisor of the number of steps, or set "
                        '"test": "robust".'
                    )
                    raise ScheduleError(
                        self.type_name, [ParameterProblem("steps_per_epoch", message)]
                    )
                total = max(1, int(horizon.scaled_steps or 1))
                return dataclasses.replace(self, steps_per_epoch=total, total_epochs=1)
        if epochs is not None and horizon.scale_ratio != 1.0:
            scaled = epochs * horizon.scale_ratio
            if scaled * (steps or 1) > MAX_STEPS:
                message = (
                    f"`total_epochs`, scaled by {horizon.scale_ratio:g}, must be at most "
                    f"{MAX_STEPS:,} steps, got {scaled * (steps or 1):g}. Reduce `total_epochs` or "
                    "the scale ratio."
                )
                raise ScheduleError(self.type_name, [ParameterProblem("total_epochs", message)])
            epochs = max(1, int(scaled))
        return dataclasses.replace(self, steps_per_epoch=steps, total_epochs=epochs)

    def bind(self, base: Base, horizon: Horizon | None = None) -> AutoWUController:
        """Return the controller for an optimizer with the initial hyperparameters ``base``.

        Raises:
            ScheduleError: neither the parameters nor ``horizon`` specify the length of the run.
        """
        resolved = self.resolve(horizon)
        for name in ("steps_per_epoch", "total_epochs"):
            if getattr(resolved, name) is None:
                message = (
                    f"`{name}` must be set if the length of the run is unknown. Set this key, or "
                    'pass `training_data` to `initialize` and set "engine": {"max_duration": '
                    '"30ep"} in the config.'
                )
                raise ScheduleError(self.type_name, [ParameterProblem(name, message)])
        return resolved.controller(base)

    def controller(self, base: Base) -> AutoWUController:
        decay = Decay(
            cooldown_type=self.cooldown_type,
            cooldown_start=(1 - self.cooldown_fraction) * self.total_steps,
            is_immediate=self.immediate_cooldown,
            factor=self.decay_phase_factor,
            reduces_on_plateau=self.decay_phase_stat == "loss",
        )
        return AutoWUController(self._warmup_test, decay, self.total_steps, base["lr"])

    @property
    def _warmup_test(self) -> WarmupTest:
        per_epoch = self.steps_per_epoch or 10
        steps = self.max_warmup_fraction * self.total_steps
        warmup = Warmup(
            steps=int(steps),
            steps_per_epoch=per_epoch,
            epochs=max(1, int(steps / per_epoch + 1e-9)),
            min_lr=self.min_lr,
            max_lr=self.max_lr,
            unit=self.warmup_unit,
            type=self.warmup_type,
        )
        return RobustTest(warmup) if self.test == "robust" else PublishedTest(warmup)

    def warnings(self) -> Iterator[str]:
        warning = self._warmup_test.warning()
        if warning is not None:
            yield warning

    def synthetic_loss(self, step: int, lr: float) -> float:
        del step
        valley = math.sqrt(self.min_lr) * math.sqrt(self.max_lr)  # the product can underflow
        return 1.0 + 0.3 * math.log10(max(lr, 1e-12) / valley) ** 2

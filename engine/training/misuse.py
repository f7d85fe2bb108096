"""Detect silent mistakes in training loops, such as two optimizer steps per batch."""

from __future__ import annotations

import logging
import sys
import weakref
from typing import Any, NoReturn, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from engine.config.wording import count_noun
from engine.distributed.ranks import Ranks
from engine.errors import MisuseError
from engine.training.accumulation import Accumulation
from engine.training.loss_window import check_loss
from engine.training.optimizers import has_no_optimizer
from engine.training.parameter_claims import EngineSteps, ParameterClaim, can_change_weights
from schedules import ScheduleBinder

__all__ = ["MisuseChecks"]

log = logging.getLogger("onecycle")

_MANY_LOSSES = 100  # between two calls to `step`; most loops call it after each loss
_CHECKED_STEPS = 3
_CHECK_INTERVAL = 100


class CheckedBackend(Protocol):
    """Protocol for the members of `engine.backends.base.Backend` that `MisuseChecks` uses."""

    @property
    def model(self) -> nn.Module:
        """The user's module."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose param groups the schedule changes."""
        ...

    @property
    def basic_optimizer(self) -> Optimizer:
        """The underlying torch optimizer."""
        ...

    @property
    def ranks(self) -> Ranks:
        """Rank and world size of this process."""
        ...

    def has_gradients(self) -> bool:
        """Return whether any of the optimizer's parameters has a gradient; True if unknown."""
        ...


class MisuseChecks:
    """Checks for mistakes in the training loop.

    The checks run at each backward pass, at each step and at the end of each epoch. They neither
    synchronize the device nor communicate with other ranks. They add a hook to the optimizer, and
    change no other object of the script. The hook counts the steps, and raises `MisuseError` if the
    script itself takes two steps between two calls to the engine's `step`. Another hook checks the
    steps of the script's other optimizers. An engine and the trial runs of its LR range tests share
    one instance of this class.

    Args:
        backend: backend of the engine.
    """

    def __init__(self, backend: CheckedBackend) -> None:
        self._backend = backend
        self._has_optimizer = not has_no_optimizer(backend.basic_optimizer)
        self.engine_step = self._counter = _StepCounter(backend.basic_optimizer)
        """Context manager in which optimizer steps belong to the engine and not to the script."""
        self._is_position_known = False
        self._count_at_loss: int | None = None  # of the last loss; None after a call to `step`
        self._finalizer = weakref.finalize(self, self._counter.release, backend.ranks)
        # The next four attributes are the position after the last step.
        self._count = 0
        self._scheduler: Any = None
        self._last_epoch = 0
        self._base_lrs: object = None
        self._micro_steps = 0  # at the end of the last epoch
        self._idle_epochs = 0
        trained = _find_trained(backend)
        self._claim = ParameterClaim(
            trained or {each for each in backend.model.parameters() if each.requires_grad},
            backend.basic_optimizer if self._has_optimizer and trained else None,
            is_main=backend.ranks.rank == 0,
        )
        self._steps_of_rivals: int | None = None
        self._frozen = [
            (name, parameter)
            for name, parameter in backend.model.named_parameters()
            if not parameter.requires_grad and parameter not in self._claim.parameters
        ]

    def release(self) -> None:
        """Remove the step-counting hook from the optimizer, and warn if `step` was never called."""
        self._finalizer()
        self._claim.release()

    def restart(self) -> None:
        """Discard the recorded step counts of the optimizer and the scheduler.

        Call this method if the engine changes the counts between two steps, for example by loading
        a checkpoint.
        """
        self._is_position_known = False
        self._count_at_loss = None
        self._counter.direct_steps = 0

    def check_loss(self, loss: object, accumulation: Accumulation) -> None:
        """Check the loss that a script passes to `backward` or `scale`.

        If the script seems to have forgotten the calls to `step`, log a warning.

        Raises:
            ValueError: the loss is not a scalar tensor that requires grad.
            RuntimeError: the engine has no optimizer, or the script has called `optimizer.step()`
                since the previous loss.
        """
        if not self._has_optimizer:
            _raise_without_optimizer()
        check_loss(loss)
        count = self._counter.count
        if self._count_at_loss not in (None, count):
            _raise_direct_step()
        self._count_at_loss = count
        self._counter.losses += 1
        # Without managed accumulation, the script calls `step` once per batch.
        if self._counter.losses == _MANY_LOSSES and accumulation.is_managed:
            self._counter.has_warned = True
            self._warn(
                f"`trainer.backward(loss)` was called {_MANY_LOSSES} times since the last call to "
                "`trainer.step()`. Call `trainer.step()` after each micro-batch."
            )

    def check_accumulated(self, accumulation: Accumulation) -> None:
        """Check that the gradients of a batch's earlier micro-batches have not been cleared.

        Raises:
            RuntimeError: the gradients were cleared.
        """
        if not self._backend.has_gradients():
            done, steps = accumulation.micro_batches, accumulation.steps
            raise MisuseError(
                "Each optimizer step accumulates gradients over "
                f"{count_noun(steps, 'micro-batch')}, but the gradients of "
                f"{count_noun(done, 'micro-batch')} were cleared before the step. Remove the call "
                "to `zero_grad()`, because `trainer.step()` clears the gradients after each "
                "optimizer step."
            )

    def check_step(
        self, scheduler: object, accumulation: Accumulation, *, is_boundary: bool
    ) -> None:
        """Check the calls that the script has made since its previous call to `step`.

        Call this method at the start of each call to `step`.

        Args:
            scheduler: the run's scheduler; None if the run has none.
            accumulation: counter of the micro-batches since the previous optimizer step.
            is_boundary: whether this call to `step` steps the optimizer.

        Raises:
            RuntimeError: the engine has no optimizer, the script has stepped the optimizer or the
                scheduler directly, there are no gradients, gradients of earlier micro-batches were
                cleared, or two engines undo each other's steps.
        """
        if not self._has_optimizer:
            _raise_without_optimizer()
        self._count_at_loss = None
        if self._is_position_known:
            self._check_position(scheduler)
        if accumulation.has_gradients:
            self.check_accumulated(accumulation)
        if not is_boundary:
            return
        if not self._backend.has_gradients():
            _raise_without_gradients(accumulation)
        if self._claim.rivals:
            self._check_rivals()
        self._is_position_known = False  # until this step completes

    def note_step(self, scheduler: Any, global_steps: int) -> None:
        """Record how many steps the optimizer and the scheduler have taken.

        Call this method after each completed batch.

        Args:
            scheduler: the run's scheduler; None if the run has none.
            global_steps: number of completed batches.
        """
        self.note_scheduler(scheduler)
        self._count = self._counter.count
        self._is_position_known = True
        self._claim.steps += 1
        if self._frozen and (global_steps <= _CHECKED_STEPS or global_steps % _CHECK_INTERVAL == 0):
            self._check_unfrozen()

    def note_scheduler(self, scheduler: Any) -> None:
        """Record how many steps the scheduler has taken.

        Call this method each time the engine has stepped the scheduler.
        """
        if scheduler is not self._scheduler:
            self._scheduler = scheduler if _has_position(scheduler) else None
        if self._scheduler is not None:
            self._last_epoch = self._scheduler.last_epoch
            self._base_lrs = getattr(scheduler, "base_lrs", None)

    def check_epoch(self, micro_steps: int, accumulation: Accumulation) -> None:
        """Check at the end of an epoch whether the script forgot to call `step`.

        Args:
            micro_steps: number of calls to `step` so far.
            accumulation: counter of the micro-batches since the previous optimizer step.

        Raises:
            RuntimeError: the script called `backward` but not `step` in two consecutive epochs.
        """
        has_stepped = micro_steps != self._micro_steps or accumulation.micro_batches > 0
        is_idle = accumulation.scaled_losses > 0 and not has_stepped
        self._idle_epochs = self._idle_epochs + 1 if is_idle else 0
        self._micro_steps = micro_steps
        self._check_unfrozen()
        text = (
            f"`trainer.backward(loss)` was called in {count_noun(self._idle_epochs, 'epoch')}, but "
            "`trainer.step()` was not, so the model was not trained. Call `trainer.step()` after "
            "each backward pass."
        )
        self._counter.has_warned |= is_idle
        if self._idle_epochs > 1:
            raise MisuseError(text)
        # A script may train on the whole dataset at once, and call `step` after the first epoch.
        if self._idle_epochs == 1:
            self._warn(text)

    def _check_position(self, scheduler: Any) -> None:
        known = self._scheduler
        has_moved = known is not None and scheduler is known and known.last_epoch > self._last_epoch
        # Loading a state also moves a scheduler, but replaces `base_lrs`.
        has_moved = has_moved and getattr(known, "base_lrs", None) is self._base_lrs
        stepped = ["`optimizer.step()`"] if self._counter.count != self._count else []
        stepped += ["`scheduler.step()`"] if has_moved else []
        if stepped:
            calls = " and ".join(stepped)
            raise MisuseError(
                f"The script calls {calls}, but `trainer.step()` already steps the optimizer and "
                f"the scheduler. Remove {calls} from the script."
            )

    def _check_rivals(self) -> None:
        claim = self._claim
        before, now = self._steps_of_rivals, sum(rival.steps for rival in claim.rivals)
        self._steps_of_rivals = now
        # A script may build an engine for a model and then replace it with a new engine.
        if before is None or before == now:
            return
        shared = claim.parameters & set[Any]().union(*(each.parameters for each in claim.rivals))
        claim.forget_rivals()
        named = self._backend.model.named_parameters()
        example = next(f"`{name}`" for name, parameter in named if parameter in shared)
        text = (
            f"Two engines take turns training the same parameters, such as {example}. Each engine "
            "has its own optimizer state and schedule. Build only one engine for a model, or pass "
            "different `model_parameters` to each."
        )
        # DeepSpeed's own optimizers have copies of the weights, so each engine would undo the steps
        # of the other.
        if self._backend.optimizer is not self._backend.basic_optimizer:
            raise MisuseError(text)
        self._warn(text)

    def _check_unfrozen(self) -> None:
        unfrozen = [(name, p) for name, p in self._frozen if p.requires_grad]
        if not unfrozen:
            return
        self._frozen = [(name, p) for name, p in self._frozen if not p.requires_grad]
        groups = self._backend.optimizer.param_groups
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        names = [f"`{name}`" for name, parameter in unfrozen if id(parameter) not in trained]
        if names:
            self._warn(
                "These parameters require gradients but are not trained: "
                f"{_shorten(names)}. They were frozen when the engine was built, so they are in no "
                "param group. Include them in the argument `model_parameters` of `initialize` or, "
                "if there is no schedule, call `optimizer.add_param_group`."
            )

    def _warn(self, text: str) -> None:
        if self._backend.ranks.rank == 0:
            log.warning("%s", text)


class _StepCounter:
    """Counter of an optimizer's steps, and of the losses since the last call to `step`.

    The optimizer's step hook refers to this object and not to the engine. The hook therefore does
    not keep the engine alive. Each engine uses its counter as a context manager around its own
    optimizer steps, so that the hook does not report them as steps of the script.
    """

    def __init__(self, optimizer: Any) -> None:
        self.count = 0
        self.losses = 0
        self.direct_steps = 0  # of the script, since the last call to `step`
        self.has_warned = False  # of losses without a step
        self._has_stepped = False
        self._handle: Any = None
        if hasattr(optimizer, "_optimizer_step_post_hooks"):  # some wrappers have no hooks
            self._handle = optimizer.register_step_post_hook(self._add)

    def __enter__(self) -> None:
        self._has_stepped = True
        self.losses = self.direct_steps = 0
        EngineSteps.active += 1

    def __exit__(self, *_: object) -> None:
        EngineSteps.active -= 1

    def release(self, ranks: Ranks) -> None:
        """Remove the hook, and warn if the script passed losses but never called `step`."""
        if self._handle is not None:
            self._handle.remove()
        is_untrained = self.losses > 1 and not self._has_stepped and not self.has_warned
        has_failed = sys.exc_info()[0] is not None or hasattr(sys, "last_value")
        if is_untrained and ranks.rank == 0 and not has_failed:
            log.warning(
                "`trainer.backward(loss)` was called %d times, but `trainer.step()` was never "
                "called, so the model was not trained; call `trainer.step()` after each backward "
                "pass",
                self.losses,
            )

    def _add(self, optimizer: Optimizer, *_: object) -> None:
        self.count += 1
        if EngineSteps.active or not can_change_weights(optimizer):
            return
        self.direct_steps += 1
        # `check_step` reports a single step, and knows whether the engine takes steps, too.
        if self.direct_steps > 1:
            _raise_direct_step()


def _find_trained(backend: CheckedBackend) -> set[Any]:
    """Return the model parameters that the optimizer trains.

    The set is empty if the optimizer holds copies of the parameters, as DeepSpeed's optimizers do.
    """
    groups = getattr(backend.optimizer, "param_groups", ())  # absent for DeepSpeed's inference
    optimized = {id(parameter) for group in groups for parameter in group["params"]}
    return {parameter for parameter in backend.model.parameters() if id(parameter) in optimized}


def _has_position(scheduler: object) -> bool:
    """Return whether ``last_epoch`` can be used to detect that the script steps the scheduler.

    Return False for a scheduler that takes a metric, such as ``ReduceLROnPlateau``, because the
    script is allowed to step such a scheduler.
    """
    takes_metric = isinstance(scheduler, ReduceLROnPlateau) or (
        isinstance(scheduler, ScheduleBinder) and scheduler.schedule.feedback == "metric"
    )
    return not takes_metric and isinstance(getattr(scheduler, "last_epoch", None), int)


def _raise_without_optimizer() -> NoReturn:
    raise MisuseError(
        "The engine was built without an optimizer, so it cannot train the model. Pass the "
        'argument `optimizer` to `initialize`, or add "optimizer": {"type": "AdamW", "params": '
        '{"lr": 0.001}} to the config.'
    )


def _raise_direct_step() -> NoReturn:
    raise MisuseError(
        "The script calls `optimizer.step()`. Call `trainer.backward(loss)` and `trainer.step()` "
        "instead. They average the gradients over all ranks, and step the optimizer and the "
        "scheduler."
    )


def _raise_without_gradients(accumulation: Accumulation) -> None:
    if accumulation.scaled_losses == 0:
        raise MisuseError(
            "`trainer.step()` was called, but no backward pass has run since the previous "
            "optimizer step. Call `trainer.backward(loss)` before each `trainer.step()`."
        )
    raise MisuseError(
        "`trainer.step()` found no gradients, although `trainer.backward(loss)` was called. Do not "
        "clear the gradients between the two calls, and check that the loss depends on the "
        "parameters of the optimizer."
    )


def _shorten(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"

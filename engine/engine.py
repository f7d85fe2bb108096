"""The engine that ``initialize`` returns: a model at work, called like the model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from engine.backends.base import Backend
from engine.checkpoint import saving
from engine.checkpoint.fingerprint import Identity
from engine.checkpoint.manager import Checkpoints
from engine.checkpoint.rng import load_random_state, random_state
from engine.config import Config
from engine.errors import MisuseError
from engine.range_test.sweep import Recorder
from engine.training.data import RunLoader, called_on
from engine.training.monitors import Monitor
from engine.training.progress import Counters, Progress
from schedules import Schedule, ScheduleBinder, bind
from schedules.core.controller import Evidence

__all__ = ["Engine"]

log = logging.getLogger("onecycle")


class Engine(Checkpoints, nn.Module):
    """A model at work: called like the model, it adds up gradients and updates by the config.

    The loop is ``loss = …engine(x)…; engine.backward(loss); engine.step()`` for each micro-batch;
    an update happens in every ``gradient_accumulation_steps()``-th `step`.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        lr_scheduler: LRScheduler | None,
        loader: DataLoader[Any] | None,
        identity: Identity,
        monitors: Sequence[Monitor] = (),
    ) -> None:
        super().__init__()
        self.module = backend.model
        self.optimizer = backend.optimizer
        self.lr_scheduler = lr_scheduler
        self.training_dataloader = loader
        self.config = config
        self._backend = backend
        self._identity = identity
        self._accumulation = config.batch.accumulation
        # Apart, because nn.Module makes every assignment to an attribute of its own slow.
        self._done = Counters()
        self._progress = Progress(config, monitors)
        self._boundary: bool | None = None  # as `set_gradient_accumulation_boundary` has it
        self._synchronizes = True
        self._scaled_losses = 0  # in this window, by `backward` or `scale`
        self._recorder: Recorder | None = None
        self._rehearses = False  # a range test: it leaves nothing behind
        hears = lr_scheduler.schedule.feedback if isinstance(lr_scheduler, ScheduleBinder) else None
        # Losses of this update, if anybody asks for them.
        self._window: list[Tensor] | None = [] if hears == "loss" else None
        self._metric: Tensor | float | None = None  # until an update is applied that takes it
        self._rollback = saving.Rollback(config, backend) if hears else None
        self._behind = saving.Behind() if config.checkpoint.behind else None
        self._signals = None
        self._updates_before = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model in the run's precision."""
        last = self.is_gradient_accumulation_boundary() and self._synchronizes
        return self._backend.forward(*args, last_micro_batch=last, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # nn.Module's own is asked first for parameters and modules; then come the model's names.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_backend" not in vars(self):
                raise
            return self._backend.attribute(name)

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """Add the gradients of a micro-batch's loss; return the loss over the number of losses.

        Args:
            loss: a scalar that has a graph: the mean over the micro-batch. It is scaled and divided
                by the number of accumulated losses here.
            retain_graph: whether the graph is to be kept for another backward pass.
            scale_wrt_gas: whether the loss is divided by the number of accumulated losses.

        Raises:
            ValueError: the loss is no scalar tensor with a graph.
        """
        _refuse_what_is_no_loss(loss)
        divisor = self._accumulation if scale_wrt_gas else 1
        self._backend.backward(loss, divisor, retain_graph=retain_graph)
        self._scaled_losses += 1
        if self._window is not None:
            self._window.append(loss.detach())
        self._progress.add(loss)
        return loss if divisor == 1 else loss / divisor

    def scale(self, loss: Tensor) -> Tensor:
        """Return a loss scaled and divided as by `backward`, for a ``.backward()`` of your own.

        Raises:
            ValueError: the loss is no scalar tensor with a graph.
        """
        _refuse_what_is_no_loss(loss)
        self._scaled_losses += 1
        if self._window is not None:
            self._window.append(loss.detach())
        self._progress.add(loss)
        return self._backend.scale(loss, self._accumulation)

    def step(
        self,
        lr_kwargs: Mapping[str, Any] | None = None,
        *,
        metric: Tensor | float | None = None,
    ) -> bool:
        """Count a micro-batch and, if it completes a batch, update the parameters.

        A loss whose own ``.backward()`` was called is divided here by the number of micro-batches.

        Args:
            lr_kwargs: accepted as DeepSpeed does; a schedule needs no arguments.
            metric: what a schedule like ReduceLROnPlateau listens to, in an update that has one, as
                the last of an epoch; every rank gives its own, and the schedule gets the mean.

        Returns:
            Whether an update was applied. One whose gradients are not finite is skipped: it does
            not move the schedule.

        Raises:
            RuntimeError: the run is over, see `run_is_over`, or the ranks are kept from meeting.
        """
        if not self._synchronizes:
            raise MisuseError(
                "It is illegal to call Engine.step() inside no_sync context manager; leave first."
            )
        if self._rehearses and self._recorder is not None:
            self._recorder.stop_if_over()  # again, if the script caught it
        if self.run_is_over:
            raise RuntimeError(
                f"the run must end after {self.config.steps_this_run} updates "
                "(`engine.steps_this_run`), which are done; leave the loop when `run_is_over`."
            )
        del lr_kwargs
        if metric is not None:
            self._metric = metric
        done = self._done
        last = self.is_gradient_accumulation_boundary()
        done.micro_steps += 1
        done.applied = last and self._update()
        if not last:
            return False
        done.global_steps += 1
        if not done.applied:
            self._count_skipped()
        self._progress.tell(self, done)
        if self._recorder is not None:
            self._note(self._recorder)
        if self._rollback is not None:
            self._tell(self._rollback)
        elif done.applied and self.lr_scheduler is not None:
            self._advance(self.lr_scheduler)
        self.save_if_due()
        return done.applied

    def _advance(self, scheduler: LRScheduler) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        elif (metric := self._taken_metric()) is not None:
            scheduler.step(metric)

    def _taken_metric(self) -> float | None:
        """Return the mean over the ranks of what this update was given, once."""
        metric, self._metric = self._metric, None
        return None if metric is None else self.mean(float(metric))

    def record(self, recorder: Recorder, *, rehearses: bool) -> None:
        """Have every update noted; a rehearsal saves nothing, and ends when the sweep does."""
        self._recorder, self._rehearses, self._window = recorder, rehearses, []

    def _note(self, recorder: Recorder) -> None:
        if not (self._window or self._rehearses):
            return  # the gradients came from the script's own `loss.backward()`
        momentum = self.get_momentum()
        used = self.get_lr()[0], momentum[0] if momentum else None
        recorder.note(*used, self._mean_loss(), applied=self._done.applied)
        if self._rehearses:
            recorder.stop_if_over()

    def _tell(self, rollback: saving.Rollback) -> None:
        """Tell a schedule that listens of an update that was applied, and forget any other."""
        scheduler = self.lr_scheduler
        assert isinstance(scheduler, ScheduleBinder)
        if not self._done.applied:
            if self._window is not None:
                self._window.clear()
        elif self._window is not None:
            scheduler.step(self._mean_loss())
            if scheduler.just_decided and self.global_rank == 0:
                self._draw(scheduler.evidence)
            rollback.follow(scheduler)
        else:
            scheduler.step(metric=self._taken_metric())

    def _draw(self, evidence: Evidence | None) -> None:
        """Draw why a schedule has switched, if it is wanted."""
        if self.config.report is None or evidence is None:
            return
        from engine.display.plots import draw_decision

        assert self.config.schedule is not None
        name = self.config.schedule.type_name
        path = Path(self.config.report) / f"{name.lower()}.png"
        try:
            draw_decision(evidence, path, name)
        except Exception as error:  # noqa: BLE001  # no picture is worth a run
            log.warning("%s was not drawn, and training goes on: %s", path, error)
        else:
            log.info("why: %s", path)

    def _mean_loss(self) -> float:
        """Return the mean of this update's losses, over all micro-batches and ranks."""
        if not self._window:
            raise RuntimeError(
                "the loss must be known here, but this update's gradients came from the script's "
                "own `loss.backward()`; call `engine.backward(loss)` instead."
            )
        loss = float(torch.stack(self._window).float().mean())
        self._window.clear()
        return self._backend.mean(loss)

    @contextlib.contextmanager
    def rehearsal(self, recorder: Recorder, schedule: Schedule[Any]) -> Iterator[None]:
        """Let training inside leave no trace: all is as it was afterwards, also after an exception.

        Args:
            recorder: notes the updates.
            schedule: drives the optimizer in place of the run's.

        Raises:
            ValueError: an update is begun, whose gradients would be lost.
        """
        if self._done.micro_steps % self._accumulation:
            raise ValueError("a rehearsal must begin between updates; step to the end of this one.")
        loader = self.training_dataloader
        position = self._loader_state()
        resumes = isinstance(loader, RunLoader) and loader.resumes
        modes = {module: module.training for module in self.modules()}
        names = "config lr_scheduler _done _progress _recorder _rehearses _rollback _window"
        kept = {name: getattr(self, name) for name in names.split()}
        draws, snapshot = random_state(), self._backend.snapshot()
        try:
            self.config = self.config.rehearsal(schedule)
            self._done, self._progress = Counters(), Progress(self.config, ())
            self.lr_scheduler, self._rollback = bind(schedule, self.optimizer), None
            self.record(recorder, rehearses=True)
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)
            self._scaled_losses = 0
            for module, mode in modes.items():
                module.training = mode
            self.zero_grad()
            self._backend.restore(snapshot)
            load_random_state(draws)
            if isinstance(loader, RunLoader) and position is not None:
                loader.load_state_dict(position, resumes=resumes)

    def _update(self) -> bool:
        scaled, self._scaled_losses = self._scaled_losses, 0
        if scaled:
            return self._backend.step()
        if self._backend.loss_scale != 1.0:
            raise RuntimeError(
                "in fp16 a loss must be scaled, but neither `engine.backward(loss)` nor "
                "`engine.scale(loss).backward()` was called in this update; call one of them."
            )
        return self._backend.step(divide_by=self._accumulation)

    def _count_skipped(self) -> None:
        done = self._done
        done.skipped_steps += 1
        log.warning(
            "update %d skipped: its gradients are not finite (%d skipped so far)",
            done.global_steps,
            done.skipped_steps,
        )

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the next `step` updates the parameters."""
        if self._boundary is not None:
            return self._boundary
        return (self._done.micro_steps + 1) % self._accumulation == 0

    def was_step_applied(self) -> bool:
        """Return whether the last `step` updated the parameters."""
        return self._done.applied

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say by hand whether the next micro-batches end an update, from the forward pass on."""
        self._boundary = is_boundary

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep the ranks from meeting in the backward passes inside.

        Raises:
            RuntimeError: ZeRO stages 2 and 3 divide gradients in each backward pass.
        """
        if self.config.zero_stage >= 2:
            raise MisuseError(
                "the no_sync context manager is incompatible with ZeRO stages 2 and 3, which "
                "divide gradients in each backward pass; let `gradient_accumulation_steps` do "
                "the counting."
            )
        if not self._synchronizes:
            raise MisuseError(
                "no_sync context manager reentry is unsupported; leave the one outside first."
            )
        self._synchronizes = False
        try:
            yield
        finally:
            self._synchronizes = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that were added up so far."""
        del set_to_none
        self._backend.zero_grad()

    def train_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """Train on a whole batch, its micro-batches from an iterator; return the mean loss.

        The model is to return the loss of a micro-batch, as DeepSpeed's pipelines do; tuples and
        mappings are taken apart into its arguments.
        """
        losses = []
        for _ in range(self._accumulation):
            loss = self._called_on_next(data_iter)
            losses.append(self.backward(loss).detach())
            self.step()
        return torch.stack(losses).sum()

    def eval_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """Return the mean loss of a whole batch, its micro-batches from an iterator."""
        training = self.training
        self.eval()
        with torch.no_grad():
            losses = [self._called_on_next(data_iter) for _ in range(self._accumulation)]
        self.train(training)
        return torch.stack(losses).mean()

    def _called_on_next(self, data_iter: Iterator[Any]) -> Any:
        batch = next(data_iter, None)
        if batch is None:
            raise ValueError(
                f"`data_iter` must give {self._accumulation} micro-batches, but ended before; make "
                "it endless, or stop at the end of an epoch."
            )
        return called_on(self, batch)

    def empty_partition_cache(self) -> None:
        """Let go of gathered parameters, which DeepSpeed's stage 3 keeps and nothing else does."""
        if self.config.backend.name == "deepspeed":
            self._backend.attribute("empty_partition_cache")()

    def destroy(self) -> None:
        """Let go of what the backend holds; the model is the caller's again."""
        if self._signals is not None:
            self._signals.forget()
        if self._behind is not None:
            self._behind.close()
        self._backend.destroy()

    @property
    def run_is_over(self) -> bool:
        """Whether this run has applied the updates that ``engine.steps_this_run`` gives it."""
        limit = self.config.steps_this_run
        return limit is not None and self._updates - self._updates_before >= limit

    @property
    def global_samples(self) -> int:
        """Samples of the whole batches so far, over all ranks."""
        return self._done.global_steps * self.config.batch.train

    @property
    def skipped_steps(self) -> int:
        """Updates that were skipped because their gradients were not finite."""
        return self._done.skipped_steps

    @property
    def micro_steps(self) -> int:
        """Micro-batches so far."""
        return self._done.micro_steps


def _refuse_what_is_no_loss(loss: object) -> None:
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return
    shown = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise ValueError(
        f"`loss` must be a scalar tensor that the model computed with gradients, but is "
        f"{shown}{'' if getattr(loss, 'requires_grad', True) else ' without a graph'} "
        "instead; take its mean, and compute it outside of torch.no_grad()."
    )

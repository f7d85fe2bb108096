"""Train pipelines, evaluate batches, iterate over the data, and preserve the training state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.backends.base import Backend
from engine.backends.deepspeed_names import is_pipeline
from engine.config.wording import count_noun
from engine.errors import MisuseError
from engine.run.training_run import TrainingRun
from engine.training.data import call_on_batches, repeat_batches
from engine.training.evaluation import preserve_modes
from engine.training.loader import RunLoader
from engine.training.rng import preserve_rng_state
from schedules import ScheduleBinder

__all__ = ["evaluate_batch", "iterate_batches", "preserve_state", "train_pipeline"]


def train_pipeline(
    batches: Iterator[Any] | None, loader: RunLoader | None, run: TrainingRun
) -> Tensor | None:
    """Train a pipeline model on one batch, and return the mean loss.

    If the model is not a pipeline, return None without training.

    Args:
        batches: iterator over micro-batches; None to use those of ``loader``.
        loader: the run's data loader. If ``batches`` and ``loader`` are None, the pipeline uses
            the data that was passed to its ``set_dataloader`` or ``set_dataiterator``.
        run: state of the run.
    """
    batches = batches or (repeat_batches(loader) if loader is not None else None)
    run._check_may_step()  # noqa: SLF001  # private to the package
    run.misuse.check_step(run.scheduler, run.accumulation, is_boundary=False)
    with run.misuse.engine_step:
        result = run.backend.run_pipeline(batches, trains=True)
    if result is None:
        return None
    if loader is not None:  # the middle stages of a pipeline do not read the data
        loader.is_used = True
    loss, run.counters.applied = result
    run.counters.micro_steps += run.accumulation.steps
    run.add_loss(loss.detach())
    run.accumulation.scaled_losses = 0
    run._finish_step()  # noqa: SLF001  # private to the package
    run.misuse.note_step(run.scheduler, run.counters.global_steps)
    return loss


def train_on_batches(
    trainer: Any, batches: Iterator[Any] | None, loader: RunLoader | None, run: TrainingRun
) -> Tensor:
    """Train an engine's model on the micro-batches of one step, and return their mean loss.

    Args:
        trainer: the engine, whose model returns the loss of a micro-batch.
        batches: iterator over micro-batches; None to use those of ``loader``.
        loader: the run's data loader; None if it has none.
        run: state of the run.
    """
    losses = []
    for loss in call_on_batches(trainer, batches or repeat_batches(loader), run.accumulation.steps):
        losses.append(trainer.backward(loss).detach())
        trainer.step()
    return torch.stack(losses).sum()


def evaluate_batch(
    model: nn.Module,
    batches: Iterator[Any],
    run: TrainingRun,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Return the mean loss of the next batch, without training.

    Args:
        model: model that returns the loss of a micro-batch.
        batches: iterator over micro-batches.
        run: state of the run.
        args: further positional arguments of DeepSpeed's ``PipelineEngine.eval_batch``.
        kwargs: keyword arguments of the same method.

    Raises:
        TypeError: ``args`` or ``kwargs`` is not empty, but the model is not a pipeline.
    """
    if args or kwargs:
        if not is_pipeline(run.backend):
            names = ", ".join(f"`{name}`" for name in kwargs or {}) or f"{len(args)} more"
            raise TypeError(
                "Without a pipeline, `eval_batch` takes only `data_iter`, got "
                f"{names}. Remove the argument, or train a DeepSpeed PipelineModule."
            )
        return run.backend.get_attribute("eval_batch")(batches, *args, **(kwargs or {}))
    if result := run.backend.run_pipeline(batches, trains=False):
        return result[0]
    losses = call_on_batches(model, batches, run.accumulation.steps)
    return torch.stack(list(losses)).mean()


def iterate_batches(loader: RunLoader | None, run: TrainingRun) -> Iterator[Any]:
    """Return an iterator over the batches of a run; see `Engine.batches`."""
    if loader is None:
        raise MisuseError(
            "`trainer.batches()` requires training data. Pass `training_data` to `initialize`, "
            "or pass a data loader to `trainer.prepare`."
        )
    if not (run.length.is_known or run.is_trial):
        scheduler = run.scheduler
        reason = "the config has no `scheduler`. Add one, or set"
        if scheduler is not None:
            reason = f"the scheduler {type(scheduler).__name__} has no known end. Set"
        if isinstance(scheduler, ScheduleBinder):
            run.length.schedule_steps = scheduler.length
            reason = f"the schedule {scheduler.schedule.type_name} does not end. Set"
        if not run.length.is_known:
            raise MisuseError(
                f"The length of the run is unknown, because {reason} `engine.max_duration`, "
                'for example to "10ep".'
            )
    return iter(loader) if run.is_over else _iterate_epochs(loader, run)


def _iterate_epochs(loader: RunLoader, run: TrainingRun) -> Iterator[Any]:
    while not run.is_over:
        steps = run.counters.global_steps
        try:
            yield from loader
        finally:
            # If the script leaves its loop within an epoch, the next loop continues the epoch.
            loader.load_state_dict(loader.state_dict())
        if run.counters.global_steps == steps:
            raise MisuseError(
                "An epoch of the training data ended without an optimizer step. Call "
                "`trainer.step()`, not `optimizer.step()`, after each `trainer.backward(loss)`, "
                "and check that the data has at least "
                f"{count_noun(run.accumulation.steps, 'micro-batch')}."
            )


@contextlib.contextmanager
def preserve_state(model: nn.Module, backend: Backend, loader: RunLoader | None) -> Iterator[None]:
    """Preserve the training state across a ``with`` block, even if the block raises an exception.

    Args:
        model: model whose train and eval modes are restored.
        backend: backend whose model, optimizer and loss scale are restored. Gradients are cleared.
        loader: data loader whose position is restored; None if the run has no data loader.
    """
    data = None if loader is None else (loader.state_dict(), loader.resumes, loader.is_used)
    with preserve_rng_state():
        snapshot = backend.snapshot()
        try:
            with preserve_modes(model):
                yield
        finally:
            backend.zero_grad()
            backend.restore(snapshot)
            if loader is not None and data is not None:
                loader.load_state_dict(data[0], resumes=data[1])
                loader.is_used = data[2]

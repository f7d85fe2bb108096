"""The training engine that ``initialize`` returns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, cast, overload

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from engine.backends import deepspeed_names as names
from engine.backends.base import Backend
from engine.checkpoint.automatic import AutomaticCheckpoints
from engine.checkpoint.fingerprint import Identity
from engine.checkpoint.manager import Checkpointer
from engine.config import Config
from engine.deepspeed_accessors import DeepSpeedAccessors
from engine.errors import MisuseError
from engine.run import training_loops
from engine.run.training_run import TrainingRun
from engine.training.data import count_steps_per_epoch, read_epoch
from engine.training.deferred_step import StepResult
from engine.training.evaluation import Evaluator, Metrics, Scalar, evaluation_mode
from engine.training.loader import RunLoader
from engine.training.monitors import Monitors
from engine.training.optimizers import has_no_optimizer, set_optimizer_mode
from engine.training.own_loaders import prepare_loader
from engine.training.rng import preserve_rng_state

__all__ = ["Engine"]

log = logging.getLogger("onecycle")

LoaderT = TypeVar("LoaderT", bound=Iterable[Any])


class Engine(DeepSpeedAccessors):
    """A training engine that wraps the model and is called like the model.

    For each micro-batch ``x``, compute the loss from the engine's output, ``trainer(x)``. Then call
    ``trainer.backward(loss)`` and ``trainer.step()``. `step` applies an optimizer step once every
    ``gradient_accumulation_steps()`` calls.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        lr_scheduler: LRScheduler | None,
        loader: RunLoader | None,
        identity: Identity,
        monitors: Monitors | None = None,
    ) -> None:
        super().__init__()
        self.module = backend.model
        self.optimizer: Any = None if has_no_optimizer(backend.optimizer) else backend.optimizer
        self.training_dataloader: RunLoader | None = None
        self._backend = backend
        self._checkpointer = Checkpointer(config, backend, identity)
        self._automatic = AutomaticCheckpoints(config.checkpoint, self._checkpointer, backend.ranks)
        self._evaluator = Evaluator(backend.ranks)
        self._run = TrainingRun.start(config, backend, lr_scheduler, monitors)
        self._use_loader(loader)

    def __getattr__(self, name: str) -> Any:
        # nn.Module looks up modules and parameters; `find_attribute` looks up all other names.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_backend" not in vars(self):
                raise
            return names.find_attribute(self._backend, self.config, name)

    def prepare(self, loader: LoaderT) -> LoaderT:
        """Prepare your own data loader for training. Every rank must call this method.

        The returned loader iterates like ``loader`` and

        - moves batches to this rank's device,
        - splits the samples across the ranks, unless the loader does so already,
        - stops at ``engine.max_duration``, and
        - resumes at the position that is stored in the loaded checkpoint.

        ``loader`` itself stays unchanged. If the schedule has durations in epochs, pass the loader
        as ``training_data`` to `initialize` instead.

        Args:
            loader: torch DataLoader that yields micro-batches, or a data loader that has
                ``state_dict`` and ``load_state_dict``.

        Raises:
            ValueError: ``loader`` conflicts with the config or splits its samples incorrectly.
            RuntimeError: the run already has a data loader.
        """
        if loader is self.training_dataloader:
            return loader
        if self.training_dataloader is not None:
            raise MisuseError(
                "The run already has a training data loader. Pass training data only once, either "
                "to `initialize` or to `prepare`. Pass evaluation loaders to `trainer.evaluate`."
            )
        prepared = prepare_loader(loader, self.config, self._backend.ranks)
        self._use_loader(prepared)
        return cast("LoaderT", prepared)

    def _use_loader(self, loader: RunLoader | None) -> None:
        run, ranks = self._run, self._backend.ranks
        steps_per_epoch = count_steps_per_epoch(loader, run.config, ranks)
        keys = "` and `".join(run.length.convert_durations(run.config, steps_per_epoch))
        if loader is None:
            if keys and ranks.rank == 0:
                log.warning("the run ignores `%s` until you call `trainer.prepare(loader)`", keys)
            return
        if keys:
            raise ValueError(
                f"`{keys}` must not be in epochs, because the data loader has no length. Use steps "
                "or samples, or add `__len__` to the dataset."
            )
        self.training_dataloader = loader
        loader.stop_when(lambda: self.run_is_over, lambda: self._automatic.end_run(self._run))
        loader.call_after_epoch(run.end_epoch)
        loader.call_before_first_epoch(lambda i: self._automatic.check_loop(self._run, i))
        self._checkpointer.data.set_loader(loader)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Move the inputs to this rank's device, run the model on them, and return its output."""
        self._backend.prepare_backward(is_last=self._start_pass())
        return self._backend.forward(*args, **kwargs)

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """Run the backward pass of a micro-batch and accumulate its gradients.

        Args:
            loss: unscaled scalar loss, averaged over the micro-batch; must require grad.
            retain_graph: whether to keep the graph for another backward pass.
            scale_wrt_gas: whether to divide the loss by ``gradient_accumulation_steps()``.

        Returns:
            The loss, divided by ``gradient_accumulation_steps()`` if ``scale_wrt_gas`` is true.

        Raises:
            ValueError: the loss is not a scalar tensor that requires grad.
        """
        self._run.misuse.check_loss(loss, self._run.accumulation)
        divisor = self._run.accumulation.steps if scale_wrt_gas else 1
        is_last = self._start_pass()
        self._backend.backward(loss, divisor, is_last=is_last, retain_graph=retain_graph)
        self._run.add_loss(loss.detach().clone())  # CUDA graphs write each loss to the same memory
        return loss if divisor == 1 else loss / divisor

    def scale(self, loss: Tensor) -> Tensor:
        """Scale the loss as `backward` does, so that you can call ``.backward()`` on the result.

        Raises:
            ValueError: the loss is not a scalar tensor that requires grad.
        """
        self._run.misuse.check_loss(loss, self._run.accumulation)
        is_last = self._start_pass()
        self._run.add_loss(loss.detach().clone())
        return self._backend.scale(loss, self._run.accumulation.steps, is_last=is_last)

    def _start_pass(self) -> bool:
        """Check accumulated gradients; return whether the next backward pass averages gradients."""
        names.check_is_no_pipeline(self._backend, "forward` and `backward")
        accumulation = self._run.accumulation
        if accumulation.has_gradients:
            self._run.misuse.check_accumulated(accumulation)
        return accumulation.is_last_backward()

    def step(
        self, lr_kwargs: Mapping[str, Any] | None = None, *, metric: Tensor | float | None = None
    ) -> bool | StepResult:
        """Finish a micro-batch, and take an optimizer step if the micro-batch completes a batch.

        If you call ``loss.backward()`` yourself, this method divides the gradients by
        ``gradient_accumulation_steps()``.

        Args:
            lr_kwargs: ignored; accepted for compatibility with DeepSpeed.
            metric: value of a metric, such as the validation loss. It is averaged over the ranks,
                and used by ``engine.checkpoint.best`` and by schedules such as ReduceLROnPlateau.
                Pass it in the last step of each epoch.

        Returns:
            Whether an optimizer step was applied. If the gradients are not finite, the step is
            skipped and the schedule does not advance. On a GPU, the result is usually a
            `StepResult`, and ``bool(result)`` waits for the device; see ``engine.deferred_step``.

        Raises:
            RuntimeError: this process has applied ``engine.steps_this_run`` steps, `no_sync` is
                active, no gradients were computed, or the script itself has called
                ``optimizer.step()`` or ``scheduler.step()``.
            FloatingPointError: ``engine.max_skipped_steps`` steps in a row were skipped. For a
                deferred step, the next call to `step` or the first use of the result raises the
                error.
        """
        del lr_kwargs
        names.check_is_no_pipeline(self._backend, "step")
        is_applied = self._run.step(metric)
        if self._run.accumulation.micro_batches == 0:
            self._automatic.save_if_due(self._run)
        return is_applied

    def report(self, metrics: Metrics | None = None, /, **named: Scalar) -> None:
        """Report metrics, such as a validation loss, to the log and the monitors.

        Metrics are averaged over the ranks. Every rank must call this method. The metric named in
        ``engine.checkpoint.best`` also selects the best checkpoint, controls early stopping, and is
        passed to a schedule that uses a metric.

        Args:
            metrics: numbers or scalar tensors by name, such as ``{"val/loss": 0.25}``.
            named: more metrics, such as ``val_loss=0.25``.
        """
        self._run.report({**({} if metrics is None else metrics), **named})
        if self._run.accumulation.micro_batches == 0:
            self._automatic.save_best(self._run)

    def batches(self) -> Iterator[Any]:
        """Yield the micro-batches of the training data, epoch after epoch, until the run ends.

        The run ends at ``engine.max_duration``. Without ``engine.max_duration``, the run ends at
        the end of the schedule. A resumed run starts at the saved position in the data.

        Raises:
            RuntimeError: the run does not have training data, the length of the run is unknown, or
                `step` was not called during an epoch.
        """
        return training_loops.iterate_batches(self.training_dataloader, self._run)

    def no_sync(self) -> AbstractContextManager[None]:
        """Disable gradient synchronization across ranks for backward passes inside this context.

        Raises:
            RuntimeError: the ZeRO stage is 2 or 3, or this context is already active.
        """
        return self._run.accumulation.no_sync(self.config.zero_stage)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the accumulated gradients."""
        del set_to_none
        self._backend.zero_grad()

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Train on the micro-batches of one step, and return their mean loss.

        The model must return the loss of a micro-batch. A micro-batch that is a tuple, list or
        mapping is unpacked into the model's arguments. By default, ``data_iter`` cycles through the
        training data.
        """
        loader, run = self.training_dataloader, self._run
        if (whole := training_loops.train_pipeline(data_iter, loader, run)) is not None:
            self._automatic.save_if_due(run)
            return whole
        return training_loops.train_on_batches(self, data_iter, loader, run)

    def eval_batch(self, data_iter: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Return the mean loss of one batch of ``gradient_accumulation_steps()`` micro-batches.

        Pipelines also accept the other arguments of ``PipelineEngine.eval_batch``, such as
        ``num_micro_batches`` and ``return_logits``.
        """
        with evaluation_mode(self):
            return training_loops.evaluate_batch(self, data_iter, self._run, args, kwargs)

    @overload
    def evaluate(
        self, loader: Iterable[Any], fn: Callable[[Any], Scalar | tuple[Scalar, Scalar]]
    ) -> float: ...

    @overload
    def evaluate(
        self, loader: Iterable[Any], fn: Callable[[Any], Metrics | tuple[Metrics, Scalar]]
    ) -> dict[str, float]: ...

    def evaluate(self, loader: Iterable[Any], fn: Callable[[Any], Any]) -> Any:
        """Evaluate the model and return the mean of each metric over all samples.

        The model runs in eval mode without gradients. Afterwards, the mode of each submodule and
        the random state are restored. Every rank must call this method.

        The samples are split across ranks if ``loader`` is a `DataLoader` of the whole dataset,
        even if it shuffles or has a ``DistributedSampler``. In all other cases, such as an iterable
        dataset or a custom sampler, each rank evaluates all batches of its own ``loader``.

        Args:
            loader: `DataLoader`, list or other finite iterable. Its batches are moved to
                `device`.
            fn: function that takes a batch and returns the loss or a dict of metrics. A metric is a
                number or a scalar tensor, averaged over the batch. The weight of a batch is its
                number of samples: the first dimension of its first tensor. To set a different
                weight, such as the number of tokens, return ``(metrics, weight)``. All ranks call
                ``fn`` the same number of times. A rank that has no batches left repeats a batch and
                drops the result. To collect other results, use `gather`.

        Returns:
            The mean loss or a dict of mean metrics, equal on all ranks.

        Raises:
            ValueError: ``loader`` is empty or the training loader, or ``fn`` returns no metric.
        """
        with preserve_rng_state(), evaluation_mode(self):
            return self._evaluator.average(loader, fn)

    def gather(self, value: Any) -> Any:
        """Concatenate the tensors of all ranks along the first dimension, in rank order.

        Every rank must call this method. The first dimension may differ between ranks. A scalar
        tensor counts as one row. Inside `evaluate`, a rank that has no batches left adds no rows.

        Args:
            value: tensor, or nested tuples, lists, dicts or dataclasses of tensors.

        Returns:
            The same structure with detached tensors, equal on all ranks.

        Raises:
            ValueError: ``value`` contains an object other than a tensor, or the dtypes or remaining
                dimensions differ between ranks.
        """
        return self._evaluator.gather(value)

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | float | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save a checkpoint of the run, and return True. Every rank must call this method.

        Args:
            save_dir: directory that holds the run's checkpoints; created if missing.
            tag: name or number of this checkpoint; default: ``global_stepN`` after N steps.
            client_state: your own values, such as numbers, strings, dates and tensors, which
                `load_checkpoint` returns.
            save_latest: whether `load_checkpoint` may choose this checkpoint if no tag is passed.
            exclude_frozen_parameters: whether to leave out parameters that do not require
                gradients, such as the base model in LoRA. When the checkpoint is loaded, these
                parameters keep their values.

        Raises:
            OSError: the disk is full or the directory is not writable. Older checkpoints are kept.
            RuntimeError: saving failed on a rank, or a rank did not call this method in time.
            ValueError: ``save_dir`` is empty, tags differ by rank, or ``client_state`` is invalid.
        """
        self._checkpointer.save(
            self._run,
            save_dir,
            None if tag is None else str(tag),
            client_state=client_state,
            save_latest=save_latest,
            frozen=not exclude_frozen_parameters,
        )
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | float | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str, dict[str, Any]]:
        """Restore the state of a run from a checkpoint. Every rank must call this method.

        The state consists of the model, optimizer, loss scale, RNG states, schedule, counters and
        data position.

        Args:
            load_dir: directory that was passed to onecycle's or DeepSpeed's `save_checkpoint`.
            tag: name or number of the checkpoint; default: the newest complete checkpoint.
            load_module_strict: whether the model must have exactly the saved parameters. If false,
                parameters without a saved value keep their values, and additional saved parameters
                are ignored. With DeepSpeed, false also requires ``load_optimizer_states=False``.
            load_optimizer_states: whether to restore the optimizer, loss scale and RNG states.
            load_lr_scheduler_states: whether to restore the schedule.
            load_module_only: whether to restore only the model.
            custom_load_fn: not supported; the error names `load_module_state_dict`.

        Returns:
            The checkpoint's path and its ``client_state``.

        Raises:
            FileNotFoundError: the checkpoint does not exist.
            CheckpointError: the checkpoint is damaged, or its schedule, optimizer, batch size,
                precision or world size does not match this run. The run stays unchanged.
        """
        names.check_load_function(custom_load_fn)
        self._run.settle()
        self._run.length.is_position_known = True
        path, client_state = self._checkpointer.load(
            self._run,
            load_dir,
            None if tag is None else str(tag),
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
        )
        set_optimizer_mode(self.basic_optimizer, training=self.training)
        return str(path), client_state

    def wait_for_checkpoint(self) -> None:
        """Wait until all ranks have written the checkpoint. If a save failed, raise an error."""
        self._checkpointer.wait()

    def destroy(self) -> None:
        """End the run: save a final checkpoint if needed, and release all resources.

        A checkpoint is needed if ``engine.checkpoint.every`` is set and the run has taken steps
        since the last save. No checkpoint is saved while an exception is being handled, or if some
        ranks do not call this method. The model stays usable.
        """
        try:
            self._run.settle()
            self._automatic.close(self._run)
        finally:
            self._run.progress.close()
            self._checkpointer.close()
            self._run.misuse.release()
            if self.training_dataloader is not None:
                self.training_dataloader.close()
            self._backend.destroy()

    @property
    def run_is_over(self) -> bool:
        """Whether the run has reached its end.

        The run ends after ``engine.max_duration`` or ``engine.steps_this_run``. If neither is set,
        a run that uses `batches` ends at the end of the schedule. ``engine.checkpoint.best`` can
        end the run earlier.
        """
        return self._run.is_over

    @property
    def epoch(self) -> int:
        """The zero-based index of the current epoch. It increases after an epoch's last batch."""
        self._run.length.is_position_known = True
        return read_epoch(self.training_dataloader)

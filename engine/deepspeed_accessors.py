"""Methods and properties of the training engine that have the same names as in DeepSpeed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from engine.backends import deepspeed_names as names
from engine.backends.base import Backend
from engine.backends.whole_weights import collect_weights, save_weights
from engine.config import Config
from engine.distributed.waiting import warn_of_long_wait
from engine.run.training_run import TrainingRun
from engine.training.data import make_rank_loader
from engine.training.monitors import Monitors
from engine.training.optimizers import set_optimizer_mode
from schedules.param_groups import read_lr, read_momenta, read_momentum

__all__ = ["DeepSpeedAccessors"]


class DeepSpeedAccessors(nn.Module):
    """Methods and properties of `Engine` that have the same names as in DeepSpeed.

    They work on every backend, unless their docstrings say otherwise.
    """

    _backend: Backend
    _run: TrainingRun

    @property
    def config(self) -> Config:
        """The validated config, with defaults and derived values filled in."""
        return self._run.config

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """The learning-rate scheduler, or None if the run has none.

        It advances after each applied optimizer step.
        """
        return self._run.scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: LRScheduler | None) -> None:
        self._run.scheduler = scheduler

    @property
    def device(self) -> torch.device:
        """The device that this rank trains on."""
        return self._backend.ranks.device

    @property
    def global_rank(self) -> int:
        """This process's global rank."""
        return self._backend.ranks.rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its node."""
        return self._backend.ranks.local_rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._backend.ranks.world_size

    @property
    def dp_world_size(self) -> int:
        """The number of data-parallel ranks."""
        return self._backend.ranks.data_ranks

    @property
    def data_parallel_group(self) -> Any:
        """The process group across which gradients are averaged, or None for a single process."""
        if self.config.backend.name == "deepspeed":
            return self._backend.get_attribute("data_parallel_group")
        return dist.group.WORLD if dist.is_initialized() else None

    @property
    def cur_scale(self) -> float:
        """The loss scale for the next backward pass; 1 without fp16."""
        return self._run.settled_backend.loss_scale

    @property
    def monitor(self) -> Monitors:
        """The monitors of the run, such as TensorBoard.

        To write your own metrics, call ``monitor.write_events([(name, value, samples)])`` on every
        rank. ``samples`` is the number of samples processed so far.
        """
        return self._run.progress.monitors

    @property
    def basic_optimizer(self) -> Optimizer:
        """The torch optimizer without the backend's wrapper."""
        return self._backend.basic_optimizer

    def train(self, mode: bool = True) -> Self:
        """Put the model into training mode, or eval mode if ``mode`` is false. Return the engine.

        If the optimizer has ``train`` and ``eval`` methods, it is put into the same mode.
        """
        super().train(mode)
        set_optimizer_mode(self.basic_optimizer, training=mode)
        return self

    def mean(self, value: float) -> float:
        """Return the mean of a number over all ranks. Every rank must call this method."""
        with warn_of_long_wait("mean", self._backend.ranks):
            return self._backend.mean(value)

    def train_batch_size(self) -> int:
        """Return the number of samples per optimizer step, summed over all ranks."""
        return self.config.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return the number of samples per forward pass on one rank."""
        return self.config.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Return the number of micro-batches per optimizer step."""
        return self.config.batch.accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the next `step` completes a batch and takes an optimizer step."""
        return self._run.accumulation.is_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Set whether the next calls to `step` take optimizer steps. Call before `backward`."""
        self._run.accumulation.set_boundary(is_boundary)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Set the global batch size by changing the number of micro-batches per optimizer step.

        Call this method between two optimizer steps.
        """
        self._run.set_batch_sizes(self.config.batch.with_train(train_batch_size))

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Set the micro-batch size, and change the global batch size in proportion.

        Call this method between two optimizer steps.
        """
        self._run.set_batch_sizes(self.config.batch.with_micro(micro_batch_size))

    def gradient_clipping(self) -> float:
        """Return the maximum gradient norm, or 0 if gradients are not clipped."""
        return self.config.gradient_clipping

    def steps_per_print(self) -> int | None:
        """Return the config's `steps_per_print`, or None if it is null or absent."""
        return self.config.progress.every

    def optimizer_name(self) -> str | None:
        """Return the config's optimizer type, or the class name of your own optimizer.

        As in DeepSpeed, the types Adagrad, Adam, AdamW, Lamb, Lion and Muon are in lowercase. The
        result is None if the engine has no optimizer, for example during inference.
        """
        if self.config.optimizer is not None:
            return names.read_optimizer_name(self.config)
        has_optimizer = isinstance(self.basic_optimizer, Optimizer)  # false for inference
        return type(self.basic_optimizer).__name__ if has_optimizer else None

    def get_batch_info(self) -> tuple[int, int, int]:
        """Return the global batch size, micro-batch size, and gradient accumulation steps."""
        batch = self.config.batch
        return batch.train, batch.micro, batch.accumulation

    def get_type(self) -> list[Any]:
        """Return the value of ``type`` in each param group, or 0.0 for a group without this key."""
        return [group.get("type", 0.0) for group in self._backend.optimizer.param_groups]

    def get_lr(self) -> list[float]:
        """Return the learning rate of each param group for the next step."""
        return read_lr(self._run.settled_backend.optimizer)

    def get_mom(self) -> list[float | tuple[float, ...]] | None:
        """Return the momentum of each param group (for Adam, all betas of the group).

        The result is None if the optimizer has no momentum. The value for a group without momentum
        is 0.
        """
        return read_momenta(self._run.settled_backend.optimizer)

    def get_momentum(self) -> list[float] | None:
        """Return the momentum of each param group (for Adam, the first beta of the group).

        The result is None if the optimizer has no momentum. The value for a group without momentum
        is 0.
        """
        return read_momentum(self._run.settled_backend.optimizer)

    def get_global_grad_norm(self) -> float | None:
        """Return the 2-norm of all gradients at the most recent step, before clipping.

        The result is None before the first step. On the DeepSpeed backend, the result is also None
        for bf16 without ZeRO and for mixture-of-experts models.
        """
        return self._run.settled_backend.grad_norm

    def was_step_applied(self) -> bool:
        """Return whether the most recent call to `step` applied an optimizer step."""
        return self._run.counters.applied

    @property
    def global_steps(self) -> int:
        """The number of optimizer steps so far, including skipped steps."""
        self._run.length.is_position_known = True
        return self._run.latest.global_steps

    @global_steps.setter
    def global_steps(self, value: int) -> None:
        self._run.latest.global_steps = value

    @property
    def global_samples(self) -> int:
        """The number of samples in all optimizer steps so far, summed over all ranks."""
        self._run.length.is_position_known = True
        return self._run.latest.global_samples

    @property
    def inside_no_sync_ctxt(self) -> bool:
        """Whether `no_sync` is active."""
        return not self._run.accumulation.averages_gradients

    @property
    def skipped_steps(self) -> int:
        """The number of steps that were skipped because of non-finite gradients."""
        return self._run.counters.skipped_steps

    @property
    def micro_steps(self) -> int:
        """The number of micro-batches processed so far."""
        self._run.length.is_position_known = True
        return self._run.latest.micro_steps

    @micro_steps.setter
    def micro_steps(self, value: int) -> None:
        self._run.latest.micro_steps = value
        self._run.accumulation.micro_batches = value % self.gradient_accumulation_steps()

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Sampler[Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DataLoader[Any]:
        """Build a data loader for this rank's shard of a dataset.

        Args:
            dataset: dataset to load. An `IterableDataset` must split its samples across ranks
                itself.
            batch_size: number of samples per batch on one rank; default: the micro-batch size.
            route: "train" to shuffle the samples; "eval" or "predict" to keep their order.
            pin_memory: whether to copy batches to pinned memory, if the rank uses a GPU.
            data_sampler: sampler for this rank; overrides ``route``. By default, the samples are
                split across ranks.
            collate_fn: function that turns a list of samples into a batch.
            num_local_io_workers: number of worker processes; default: 0.
        """
        return make_rank_loader(
            dataset,
            self._backend.ranks,
            batch_size=batch_size or self.config.batch.micro,
            shuffle=route == "train",
            drop_last=self.config.data.drop_last,
            sampler=data_sampler,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            num_workers=num_local_io_workers or 0,
        )

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Average the gradients across ranks at a gradient accumulation boundary.

        Between boundaries, this method does nothing. `step` averages the gradients automatically.
        Call this method only to read or change the averaged gradients before `step`.
        ``bucket_size`` is ignored.
        """
        del bucket_size
        if self._run.accumulation.is_boundary():
            self._backend.get_attribute("allreduce_gradients")()

    @contextlib.contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Delay gradient reduction until this context exits, then reduce all gradients together.

        Exit the context before you call `step`. The context requires the DeepSpeed backend with
        ZeRO.

        Raises:
            AttributeError: the run does not use the DeepSpeed backend.
            RuntimeError: `no_sync` is active.
        """
        reduction = names.find_attribute(self._backend, self.config, "coalesce_grad_reduction")
        with self._run.accumulation.coalesce(), reduction():
            yield

    def compile(
        self,
        backend: str | Callable[..., Any] | None = None,
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the model in place with `torch.compile`. A second call has no effect.

        Args:
            backend: name of the compiler, or a function; default: "inductor".
            compile_kwargs: further arguments of `torch.compile`.
            schedule: passes of DeepCompile; requires the DeepSpeed backend.
            compiled_autograd_enabled: whether to also compile backward passes; requires the
                DeepSpeed backend.

        Raises:
            ValueError: an argument requires the DeepSpeed backend.
        """
        more = {"schedule": schedule, "compiled_autograd_enabled": compiled_autograd_enabled}
        names.compile_model(self._backend, self.config, backend, compile_kwargs, more)

    def module_state_dict(
        self,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """Return the model's ``state_dict`` with unsharded weights.

        Weights sharded by FSDP2 are gathered in host memory. Every rank must call this method. On
        the DeepSpeed backend at ZeRO stage 3, the returned tensors are empty; use
        `save_16bit_model` instead.

        Raises:
            RuntimeError: the model is a ``PipelineModule``.
        """
        names.check_is_no_pipeline(self._backend, "module_state_dict", "module.state_dict")
        if self._is_deepspeed():
            found: dict[str, Any] = self._backend.get_attribute("module_state_dict")(
                destination, prefix, keep_vars, exclude_frozen_parameters
            )
            return found
        return collect_weights(
            self._backend,
            destination=destination,
            prefix=prefix,
            keep_vars=keep_vars,
            exclude_frozen=exclude_frozen_parameters,
        )

    def load_module_state_dict(
        self,
        checkpoint: Mapping[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
        fetch_z3_params: bool = True,
    ) -> None:
        """Load unsharded weights into the model. Every rank must pass the same weights.

        Args:
            checkpoint: weights by name, or a mapping that contains them under the key "module".
            strict: whether the names must match the names in the model exactly.
            custom_load_fn: function that loads the weights, called with the weights as ``src`` and
                the model as ``dst``.
            fetch_z3_params: ignored; accepted for compatibility with DeepSpeed. Sharded parameters
                are always loaded.
        """
        del fetch_z3_params
        module = checkpoint.get("module")
        weights = module if isinstance(module, Mapping) else checkpoint
        if self._is_deepspeed():
            if names.is_pipeline(self._backend) and not self.has_moe_layers:
                weights = {"module": weights}  # DeepSpeed's pipelines remove this key twice
            self._backend.get_attribute("load_module_state_dict")(weights, strict, custom_load_fn)
        elif custom_load_fn is not None:
            custom_load_fn(src=weights, dst=self.module)
        else:
            self._backend.model.load_state_dict(weights, strict=strict)

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save the unsharded weights to one file, in 16 bits if the run uses bf16 or fp16.

        Every rank must call this method. Load the file with `torch.load`.

        Returns:
            Whether the file was saved. At ZeRO stage 3, DeepSpeed saves the file only if
            ``stage3_gather_16bit_weights_on_model_save`` is true.

        Raises:
            OSError: the disk is full or the file is not writable.
        """
        if self._is_deepspeed():
            is_saved: bool = self._backend.get_attribute("save_16bit_model")(
                str(save_dir), save_filename, exclude_frozen_parameters
            )
            return is_saved
        save_weights(
            self._backend,
            Path(save_dir, save_filename),
            self.config.precision,
            exclude_frozen=exclude_frozen_parameters,
        )
        return True

    save_fp16_model = save_16bit_model  # DeepSpeed's older name

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Any] | None:
        """Gather the weights sharded by ZeRO stage 3, and return them on rank 0.

        On all other ranks, the result is None.
        """
        if self._is_deepspeed():
            name = "_zero3_consolidated_16bit_state_dict"
            found: dict[str, Any] | None = self._backend.get_attribute(name)(
                exclude_frozen_parameters
            )
            return found
        return names.gather_on_rank_0(self._backend, self.config, exclude_frozen_parameters)

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict

    def _is_deepspeed(self) -> bool:
        return self.config.backend.name == "deepspeed"

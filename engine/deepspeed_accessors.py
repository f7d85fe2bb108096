"""DeepSpeed's names for the settings and counters of an engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from engine.backends.base import Backend
from engine.config import Config
from engine.training_run import TrainingRun
from schedules.param_groups import read_lr, read_momenta, read_momentum

__all__ = ["DeepSpeedAccessors"]


class DeepSpeedAccessors(nn.Module):
    """Settings and counters under DeepSpeed's names; their meaning is the same on every backend."""

    _backend: Backend
    _run: TrainingRun

    @property
    def config(self) -> Config:
        """The validated config, with defaults and derived values filled in."""
        return self._run.config

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

    dp_world_size = world_size  # every rank is data-parallel

    @property
    def data_parallel_group(self) -> Any:
        """The process group that averages gradients; None in a single process."""
        return dist.group.WORLD if dist.is_initialized() else None

    @property
    def loss_scale(self) -> float:
        """The factor by which the next backward pass multiplies the loss; 1 without fp16."""
        return self._backend.loss_scale

    @property
    def basic_optimizer(self) -> Optimizer:
        """The underlying torch optimizer, unwrapped."""
        return self._backend.basic_optimizer

    def mean(self, value: float) -> float:
        """Return the mean of a number over the ranks. Every rank must call this method."""
        return self._backend.mean(value)

    def train_batch_size(self) -> int:
        """Return the number of samples per optimizer step, over all ranks."""
        return self.config.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return the number of samples per forward pass on one rank."""
        return self.config.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Return the number of micro-batches per optimizer step."""
        return self.config.batch.accumulation

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the batch size and the micro-batches per step; call it between two steps."""
        self._run.set_batch_sizes(self.config.batch.with_train(train_batch_size))

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch size and the batch size; call it between two steps."""
        self._run.set_batch_sizes(self.config.batch.with_micro(micro_batch_size))

    def gradient_clipping(self) -> float:
        """Return the maximum gradient norm; 0 means that gradients are not clipped."""
        return self.config.gradient_clipping

    def steps_per_print(self) -> int | None:
        """Return the config's `steps_per_print`; None if it is null or absent."""
        return self.config.progress.every

    def log_level(self) -> str | None:
        """Return the log level that the config sets for DeepSpeed; None if it sets none."""
        level: str | None = self.config.raw.get("log_level")
        return level

    def wall_clock_breakdown(self) -> bool:
        """Return the config's `wall_clock_breakdown`."""
        return bool(self.config.raw.get("wall_clock_breakdown", False))

    def optimizer_name(self) -> str | None:
        """Return the lower-case type of the config's optimizer; None if the config has none."""
        return self.config.optimizer.type.lower() if self.config.optimizer else None

    def scheduler_name(self) -> str | None:
        """Return the type of the config's schedule; None if the config has none."""
        return self.config.schedule.type_name if self.config.schedule else None

    def fp16_enabled(self) -> bool:
        """Return whether the run uses float16."""
        return self.config.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        """Return whether the run uses bfloat16."""
        return self.config.precision == "bf16"

    def zero_optimization(self) -> bool:
        """Return whether the ZeRO stage is above 0."""
        return self.config.zero_stage > 0

    def zero_optimization_stage(self) -> int:
        """Return the ZeRO stage."""
        return self.config.zero_stage

    def get_lr(self) -> list[float]:
        """Return the learning rate of each param group for the next step."""
        return read_lr(self._backend.optimizer)

    def get_mom(self) -> list[float] | list[tuple[float, ...]] | None:
        """Return each param group's momentum (all betas for Adam); None if there is none."""
        return read_momenta(self._backend.optimizer)

    def get_momentum(self) -> list[float] | None:
        """Return each param group's momentum (first beta for Adam); None if there is none."""
        return read_momentum(self._backend.optimizer)

    def get_global_grad_norm(self) -> float | None:
        """Return the 2-norm of the last gradients before clipping, over all parameters.

        None before the first step, and on DeepSpeed in bf16 without ZeRO and for MoE.
        """
        return self._backend.grad_norm

    def was_step_applied(self) -> bool:
        """Return whether the last call of `step` applied an optimizer step."""
        return self._run.counters.applied

    @property
    def global_steps(self) -> int:
        """The number of completed batches, including those of skipped steps."""
        self._run.length.is_position_known = True
        return self._run.counters.global_steps

    @global_steps.setter
    def global_steps(self, value: int) -> None:
        self._run.counters.global_steps = value

    @property
    def global_samples(self) -> int:
        """The number of samples in the completed batches, over all ranks."""
        return self._run.counters.global_samples

    @property
    def skipped_steps(self) -> int:
        """The number of steps that were skipped because of non-finite gradients."""
        return self._run.counters.skipped_steps

    @property
    def micro_steps(self) -> int:
        """The number of micro-batches processed so far."""
        return self._run.counters.micro_steps

    @micro_steps.setter
    def micro_steps(self, value: int) -> None:
        self._run.counters.micro_steps = value
        self._run.accumulation.micro_batches = value % self.gradient_accumulation_steps()

    def empty_partition_cache(self) -> None:
        """Release the gathered parameters that DeepSpeed's ZeRO stage 3 caches."""
        if self.config.backend.name == "deepspeed":
            self._backend.get_attribute("empty_partition_cache")()

"""What scripts for DeepSpeed ask of an engine, by DeepSpeed's names: facts that change nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from engine.backends.base import Backend
from engine.config import Config
from schedules.param_groups import momenta_of

__all__ = ["DeepSpeedNames"]


class DeepSpeedNames:
    """Read-only names of DeepSpeed's engine, with the same meaning on every backend."""

    config: Config
    optimizer: Optimizer
    _backend: Backend

    @property
    def device(self) -> torch.device:
        """The device that this rank trains on."""
        return self._backend.ranks.device

    @property
    def global_rank(self) -> int:
        """This process's rank among all."""
        return self._backend.ranks.rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its machine."""
        return self._backend.ranks.local_rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._backend.ranks.world_size

    @property
    def dp_world_size(self) -> int:
        """The number of ranks that share out a batch: all of them."""
        return self._backend.ranks.world_size

    @property
    def data_parallel_group(self) -> Any:
        """The process group that averages gradients; None in one process."""
        return dist.group.WORLD if dist.is_initialized() else None

    @property
    def loss_scale(self) -> float:
        """The factor on the loss that the next backward pass uses; 1 without fp16."""
        return self._backend.loss_scale

    @property
    def basic_optimizer(self) -> Optimizer:
        """The optimizer inside of what divides or scales it."""
        inner: Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner

    def mean(self, value: float) -> float:
        """Return the mean of a number over the ranks; every rank calls it."""
        return self._backend.mean(value)

    def train_batch_size(self) -> int:
        """Return how many samples an update sees, over all ranks."""
        return self.config.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return how many samples one forward pass sees, on one rank."""
        return self.config.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Return how many micro-batches an update averages."""
        return self.config.batch.accumulation

    def gradient_clipping(self) -> float:
        """Return the largest norm that gradients keep; 0 clips none."""
        return self.config.gradient_clipping

    def steps_per_print(self) -> int | None:
        """Return the number of updates between two lines of the log."""
        return self.config.steps_per_print

    def log_level(self) -> str | None:
        """Return the least severe messages that DeepSpeed logs, as the config has them."""
        level: str | None = self.config.own.get("log_level")
        return level

    def wall_clock_breakdown(self) -> bool:
        """Return whether times are logged."""
        return bool(self.config.own.get("wall_clock_breakdown", False))

    def optimizer_name(self) -> str | None:
        """Return the name of the config's optimizer, in lower case."""
        return self.config.optimizer.type.lower() if self.config.optimizer else None

    def scheduler_name(self) -> str | None:
        """Return the name of the config's schedule."""
        return self.config.schedule.type_name if self.config.schedule else None

    def fp16_enabled(self) -> bool:
        """Return whether the run is in float16."""
        return self.config.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        """Return whether the run is in bfloat16."""
        return self.config.precision == "bf16"

    def zero_optimization(self) -> bool:
        """Return whether anything is divided among the ranks."""
        return self.config.zero_stage > 0

    def zero_optimization_stage(self) -> int:
        """Return what is divided among the ranks: see ``zero_optimization.stage``."""
        return self.config.zero_stage

    def get_lr(self) -> list[float]:
        """Return the learning rate of each param group: what the next update uses."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_mom(self) -> list[float] | list[tuple[float, ...]] | None:
        """Return the momentum (of Adam's family all betas) of each group; None if it has none."""
        return momenta_of(self.optimizer)

    def get_momentum(self) -> list[float] | None:
        """Return of each group the one number that a schedule drives: momentum or first beta."""
        momenta = self.get_mom()
        if momenta is None:
            return None
        return [of if isinstance(of, float) else float(of[0]) for of in momenta]

    def get_global_grad_norm(self) -> float | None:
        """Return the 2-norm of the last update's gradients, unclipped; None before the first.

        DeepSpeed without ZeRO does not tell it: None there too.
        """
        return self._backend.grad_norm

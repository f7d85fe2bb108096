"""The engine that ``initialize`` returns: a model at work, called like the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from engine import checkpoint
from engine.backends.base import Backend
from engine.config import Config

__all__ = ["Engine"]

log = logging.getLogger("onecycle")


@dataclass
class Counters:
    """What an engine has done so far."""

    micro_steps: int = 0
    global_steps: int = 0
    skipped_steps: int = 0
    applied: bool = False


class Engine(nn.Module):
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
    ) -> None:
        super().__init__()
        self.module = backend.model
        self.optimizer = backend.optimizer
        self.lr_scheduler = lr_scheduler
        self.training_dataloader = loader
        self.config = config
        self._backend = backend
        self._accumulation = config.batch.accumulation
        # Apart, because nn.Module makes every assignment to an attribute of its own slow.
        self._done = Counters()
        self._losses: list[Tensor] = []
        self._updates_before = 0  # those of earlier runs, when a checkpoint was loaded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model in the run's precision."""
        last = self.is_gradient_accumulation_boundary()
        return self._backend.forward(*args, last_micro_batch=last, **kwargs)

    def backward(self, loss: Tensor) -> Tensor:
        """Add the gradients of a micro-batch's loss; return the loss.

        Args:
            loss: a scalar that has a graph: the mean over the micro-batch. It is scaled and divided
                by the number of accumulated losses here.

        Raises:
            ValueError: the loss is no scalar tensor with a graph.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            shown = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(
                f"`loss` must be a scalar tensor that the model computed with gradients, but is "
                f"{shown}{'' if getattr(loss, 'requires_grad', True) else ' without a graph'} "
                "instead; take its mean, and compute it outside of torch.no_grad()."
            )
        self._backend.backward(loss, self._accumulation)
        if self.config.steps_per_print:
            self._losses.append(loss.detach())
        return loss

    def step(self) -> bool:
        """Count a micro-batch and, if it completes a batch, update the parameters.

        Returns:
            Whether an update was applied. One whose gradients are not finite is skipped: it does
            not move the schedule.

        Raises:
            RuntimeError: the run is over, see `run_is_over`.
        """
        if self.run_is_over:
            raise RuntimeError(
                f"the run must end after {self.config.steps_this_run} updates "
                "(`engine.steps_this_run`), which are done; leave the loop when `run_is_over`."
            )
        done = self._done
        last = self.is_gradient_accumulation_boundary()
        done.micro_steps += 1
        done.applied = last and self._backend.step()
        if not last:
            return False
        done.global_steps += 1
        if not done.applied:
            self._count_skipped()
            return False
        if self.config.steps_per_print and done.global_steps % self.config.steps_per_print == 0:
            self._log_progress()  # before the schedule moves on: what this update used
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return True

    def _count_skipped(self) -> None:
        done = self._done
        done.skipped_steps += 1
        log.warning(
            "update %d skipped: its gradients are not finite (%d skipped so far)",
            done.global_steps,
            done.skipped_steps,
        )

    def _log_progress(self) -> None:
        loss = self._backend.mean(float(torch.stack(self._losses).mean()))
        self._losses.clear()
        values = {"lr": self.get_lr(), "momentum": self.get_mom()}
        shown = [
            f"{name} {' '.join(format(value, '.4g') for value in dict.fromkeys(of_groups))}"
            for name, of_groups in values.items()
            if of_groups
        ]
        if self._backend.ranks.rank == 0:
            log.info("step %d: loss %.4f, %s", self.global_steps, loss, ", ".join(shown))

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the next `step` updates the parameters."""
        return (self._done.micro_steps + 1) % self._accumulation == 0

    def was_step_applied(self) -> bool:
        """Return whether the last `step` updated the parameters."""
        return self._done.applied

    @property
    def run_is_over(self) -> bool:
        """Whether this run has applied the updates that ``engine.steps_this_run`` gives it."""
        limit = self.config.steps_this_run
        return limit is not None and self._updates - self._updates_before >= limit

    @property
    def _updates(self) -> int:
        return self._done.global_steps - self._done.skipped_steps

    @property
    def global_steps(self) -> int:
        """Whole batches so far, updates that were skipped included."""
        return self._done.global_steps

    @property
    def skipped_steps(self) -> int:
        """Updates that were skipped because their gradients were not finite."""
        return self._done.skipped_steps

    @property
    def micro_steps(self) -> int:
        """Micro-batches so far."""
        return self._done.micro_steps

    @property
    def device(self) -> torch.device:
        """The device that this rank trains on."""
        return self._backend.ranks.device

    @property
    def loss_scale(self) -> float:
        """The factor on the loss that the next backward pass uses; 1 without fp16."""
        return self._backend.loss_scale

    def train_batch_size(self) -> int:
        """Return how many samples an update sees, over all ranks."""
        return self.config.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return how many samples one forward pass sees, on one rank."""
        return self.config.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Return how many micro-batches an update averages."""
        return self._accumulation

    def get_lr(self) -> list[float]:
        """Return the learning rate of each param group: what the next update uses."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_mom(self) -> list[float] | None:
        """Return the momentum (or first beta) of each group; None if the optimizer has none."""
        groups = self.optimizer.param_groups
        if "momentum" in groups[0]:
            return [float(group["momentum"]) for group in groups]
        return [float(group["betas"][0]) for group in groups] if "betas" in groups[0] else None

    def get_global_grad_norm(self) -> float | None:
        """Return the 2-norm of the last update's gradients, unclipped; None before the first."""
        return self._backend.grad_norm

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
    ) -> bool:
        """Write everything that the run needs to go on; every rank calls it.

        Args:
            save_dir: the folder of all checkpoints of the run; made if it is absent.
            tag: name of this one; by default ``global_step`` and the count of batches.
            client_state: plain values and tensors of your own, which `load_checkpoint` returns.
            save_latest: whether `load_checkpoint` without a tag is to find this one.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._backend.ranks.rank == 0:
            state = {
                **self._backend.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler else None,
                "counters": asdict(self._done),
                "client_state": dict(client_state or {}),
            }
            tag = tag or f"global_step{self.global_steps}"
            checkpoint.write(Path(save_dir), tag, state, save_latest=save_latest)
        self._backend.barrier()
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Restore model, optimizer, loss scale, schedule and counters; every rank calls it.

        Args:
            load_dir: the folder that was given to `save_checkpoint`.
            tag: which one; by default the latest.
            load_optimizer_states: whether to restore the optimizer and the loss scale.
            load_lr_scheduler_states: whether to restore the schedule.
            load_module_only: whether to restore the model alone.

        Returns:
            The checkpoint's path and its ``client_state``.

        Raises:
            FileNotFoundError: there is none, so that nothing begins anew in silence.
            ValueError: it was saved with another schedule.
        """
        path, state = checkpoint.read(Path(load_dir), tag)
        if load_module_only:
            load_optimizer_states = load_lr_scheduler_states = False
        self._backend.load_state_dict(state, optimizer=load_optimizer_states)
        if load_lr_scheduler_states and self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if not load_module_only:
            self._done = Counters(**state["counters"])
            self._updates_before = self._updates
        return str(path), state["client_state"]

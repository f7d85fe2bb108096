"""PyTorch alone: one process without any process group, or data parallelism (DDP) over many."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from engine.backends.base import DTYPES
from engine.checkpoint.plain_values import read_values, write_values
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.training.loss_scaling import LossScaler

__all__ = ["PyTorchBackend"]

_SCALER = "loss_scaler.pt"


class PyTorchBackend:
    """Trains with PyTorch's own parts; parameters stay in float32, autocast runs the forward pass.

    Args:
        model: the user's module, already on the device of ``ranks``.
        optimizer: of that module's parameters.
        config: for precision, loss scaling and clipping.
        ranks: with more than one, the process group has to be up.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, config: Config, ranks: Ranks
    ) -> None:
        self.ranks = ranks
        self.model = model
        self.optimizer = self.basic_optimizer = optimizer
        self.trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        self.grad_norm: float | None = None
        self._precision = config.precision
        self._autocast = DTYPES.get(config.precision)
        self._finds_unused = config.finds_unused
        self._clipping = config.gradient_clipping
        self._scaler = LossScaler(config.loss_scaling) if config.loss_scaling else None
        self._hands_down = False
        self._spent: list[Tensor] = []
        self._parallel = self._replicated() if ranks.world_size > 1 else None
        self._called: nn.Module = self._parallel or model

    def _replicated(self) -> DistributedDataParallel | None:
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else None
        return DistributedDataParallel(
            self.model, device_ids=devices, find_unused_parameters=self._finds_unused
        )

    def forward(self, *args: Any, last_micro_batch: bool, **kwargs: Any) -> Any:
        """Call the model in the run's precision; ranks meet only in the last micro-batch."""
        if self._parallel is not None:
            # What DDP's own no_sync() sets; as an attribute it also reaches the backward pass.
            self._parallel.require_backward_grad_sync = last_micro_batch
        with self._precision_context():
            return self._called(*args, **kwargs)

    def _precision_context(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=self._autocast)

    def backward(self, loss: Tensor, accumulation: int, *, retain_graph: bool = False) -> None:
        """Add the gradients of a loss, divided by the number of losses that an update averages."""
        scaled = self.scale(loss, accumulation)
        scaled.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's own

    def scale(self, loss: Tensor, accumulation: int) -> Tensor:
        """Return a loss whose own ``.backward()`` adds what `backward` would have added."""
        self._spent, self._hands_down = [], self.ranks.device.type == "cpu"
        factor = self.loss_scale / accumulation
        return loss if factor == 1.0 else loss * factor

    def step(self, *, divide_by: int = 1) -> bool:
        """Clip the gradients, update and clear them; return whether the update was applied.

        Gradients that are not finite are cleared without an update, in every precision. After the
        all-reduce they are the same on all ranks, and so is the verdict.
        """
        gradients = self._gradients()
        scale = self.loss_scale * divide_by
        norm = self._norm(gradients) / scale
        finite = math.isfinite(norm)
        if finite:
            factor = 1.0 / scale
            if 0 < self._clipping < norm:
                factor *= self._clipping / (norm + 1e-6)
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            self.optimizer.step()
        self.zero_grad()
        if self._hands_down:
            # malloc would give their memory back to the system, only to fault it in again page by
            # page; freed right before a backward pass, it is what that pass fills.
            self._spent = gradients
        self.grad_norm = norm
        if self._scaler is not None:
            self._scaler.update(overflow=not finite)
        return finite

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self) -> list[Tensor]:
        """Return this rank's gradients, or its parts of them."""
        return [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _norm(self, gradients: list[Tensor]) -> float:
        """Return the 2-norm of all gradients together."""
        return _norm(gradients)

    @property
    def loss_scale(self) -> float:
        """The factor on the loss that the next backward pass uses."""
        return self._scaler.scale if self._scaler else 1.0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.ranks.world_size > 1:
            dist.barrier()

    def mean(self, value: float) -> float:
        """Return the mean of a number over the ranks."""
        if self.ranks.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.ranks.device)
        dist.all_reduce(total)
        return float(total) / self.ranks.world_size

    def save(self, place: Path, *, frozen: bool = True) -> None:
        """Write model, optimizer and loss scale into a folder; every rank calls it."""
        from engine.checkpoint import state  # costs 50 ms, which who never saves need not pay

        state.write(place, self.model, self.optimizer, frozen=frozen)
        if self._scaler is not None and self.ranks.rank == 0:
            write_values(place / _SCALER, self._scaler.state_dict())

    def save_behind(
        self,
        place: Path,
        group: dist.ProcessGroup | None,
        arena: dict[str, Any],
        *,
        frozen: bool = True,
    ) -> Future[None]:
        """Do what `save` does while training goes on."""
        from engine.checkpoint import state  # costs 50 ms, which who never saves need not pay

        written = state.write_behind(place, self.model, self.optimizer, group, arena, frozen=frozen)
        if self._scaler is not None and self.ranks.rank == 0:
            write_values(place / _SCALER, self._scaler.state_dict())
        return written

    def load(self, place: Path, *, optimizer: bool, strict: bool, frozen: bool = True) -> None:
        """Restore what `save` wrote, with or without the optimizer's part; every rank calls it."""
        from engine.checkpoint import state  # costs 50 ms, which who never saves need not pay

        trained_by = self.optimizer if optimizer else None
        state.read(place, self.model, trained_by, strict=strict, frozen=frozen)
        saved = place / _SCALER
        if optimizer and self._scaler is not None and saved.is_file():
            self._scaler.load_state_dict(read_values(saved))

    def snapshot(self) -> Any:
        """Return copies of this rank's tensors, buffers that are not saved included."""
        tensors_now = {name: tensor.detach().clone() for name, tensor in _named(self.model)}
        scaler = self._scaler.state_dict() if self._scaler else None
        return copy.deepcopy((tensors_now, self.optimizer.state_dict(), scaler, self.grad_norm))

    def restore(self, snapshot: Any) -> None:
        """Put everything back, bit for bit."""
        tensors_then, optimizer, scaler, self.grad_norm = snapshot
        with torch.no_grad():
            for name, tensor in _named(self.model):
                if name in tensors_then:  # else a buffer that a forward pass has made
                    tensor.copy_(tensors_then[name])
        self.optimizer.load_state_dict(optimizer)
        if self._scaler is not None:
            self._scaler.load_state_dict(scaler)

    def attribute(self, name: str) -> Any:
        """Return the model's attribute of a name."""
        return getattr(self.model, name)

    def destroy(self) -> None:
        """Let go of the wrapper; the model and the optimizer are the caller's."""
        self._parallel = None
        self._called = self.model
        self._spent = []

    def describe(self) -> str:
        """Return what trains here, in words, for the log."""
        how = f"DDP over {self.ranks.world_size} ranks" if self._parallel else "one process"
        return f"PyTorch, {how}, {self.ranks.device}, {self._precision}"


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _norm(gradients: list[Tensor]) -> float:
    """Return the 2-norm of all gradients together."""
    if not gradients:
        return 0.0
    # torch's clip_grad_norm_ is the same kernel in twice the time; there is no public name for it.
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))  # noqa: SLF001

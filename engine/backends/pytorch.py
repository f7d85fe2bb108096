"""The PyTorch backend, which trains in a single process or, with DDP, in several."""

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
from typing_extensions import override

from engine.backends.base import DTYPES, Backend
from engine.checkpoint.plain_values import read_values, write_values
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.training.activation_checkpointing import checkpoint_activations
from engine.training.loss_scaling import LossScaler
from engine.training.optimizers import OptimizerFactory, build_optimizer

__all__ = ["PyTorchBackend"]

_SCALER = "loss_scaler.pt"


class PyTorchBackend(Backend):
    """Backend that trains with PyTorch, using DDP if there are several ranks.

    Parameters stay in float32. In bf16 and fp16, the forward pass runs under autocast.

    Args:
        model: the user's module; it is moved to the device of ``ranks``.
        optimizer: the user's optimizer, or a function that takes the parameters and returns one;
            if None, the config's optimizer is used.
        config: a validated config.
        ranks: rank, world size and device of this process. Several ranks need an initialized
            process group.
        parameters: tensors or param groups to train; if None, all that require gradients.

    Raises:
        ValueError: activation checkpointing finds no blocks, ``engine.compile`` is not a known
            compiler, or the user's optimizer does not train any parameter of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | OptimizerFactory | None,
        config: Config,
        ranks: Ranks,
        *,
        parameters: list[Any] | None = None,
    ) -> None:
        self._config = config
        _prepare_model(model, config, ranks.device)
        chosen = self._prepare_optimizer(model, optimizer, parameters)
        groups = chosen.param_groups
        super().__init__(
            model, chosen, ranks, num_parameters=sum(p.numel() for g in groups for p in g["params"])
        )
        self._autocast = DTYPES.get(config.precision)
        self._clipping = config.gradient_clipping
        self._scaler = LossScaler(config.loss_scaling) if config.loss_scaling else None
        self._keeps_gradients = False
        self._old_gradients: list[Tensor] = []
        self._parallel = self._set_up_averaging() if ranks.world_size > 1 else None
        self._forward_module: nn.Module = self._parallel or model

    def _prepare_optimizer(
        self,
        model: nn.Module,
        optimizer: Optimizer | OptimizerFactory | None,
        parameters: list[Any] | None,
    ) -> Optimizer:
        if isinstance(optimizer, Optimizer):
            _check_parameters(model, optimizer)
            return optimizer
        if parameters is None:
            parameters = [p for p in model.parameters() if p.requires_grad]
        if optimizer is not None:
            return optimizer(parameters)
        assert self._config.optimizer is not None
        return build_optimizer(self._config.optimizer, parameters)

    def _set_up_averaging(self) -> DistributedDataParallel | None:
        """Set up gradient averaging across ranks; return the DDP model, or None without DDP."""
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else None
        return DistributedDataParallel(
            self.model,
            device_ids=devices,
            find_unused_parameters=self._config.find_unused_parameters,
        )

    @override
    def forward(self, *args: Any, last_micro_batch: bool, **kwargs: Any) -> Any:
        if self._parallel is not None:
            # Set the attribute directly: DDP's no_sync() sets it only inside its context, which
            # would have to include the backward pass.
            self._parallel.require_backward_grad_sync = last_micro_batch
        with self._precision_context():
            return self._forward_module(*args, **kwargs)

    def _precision_context(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=self._autocast)

    @override
    def backward(self, loss: Tensor, accumulation: int, *, retain_graph: bool = False) -> None:
        scaled = self.scale(loss, accumulation)
        scaled.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # untyped in torch

    @override
    def scale(self, loss: Tensor, accumulation: int) -> Tensor:
        self._old_gradients, self._keeps_gradients = [], self.ranks.device.type == "cpu"
        factor = self.loss_scale / accumulation
        return loss if factor == 1.0 else loss * factor

    @override
    def step(self, *, divide_by: int = 1) -> bool:
        gradients = self._collect_gradients()
        scale = self.loss_scale * divide_by
        norm = self._compute_norm(gradients) / scale
        finite = math.isfinite(norm)  # equal on all ranks: gradients are already averaged
        if finite:
            factor = 1.0 / scale
            if 0 < self._clipping < norm:
                factor *= self._clipping / (norm + 1e-6)
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            self.optimizer.step()
        self.zero_grad()
        if self._keeps_gradients:
            # If the gradients were freed now, malloc would return their memory to the system, and
            # page faults would slow the next backward pass. If they are freed right before that
            # pass instead, the memory is reused.
            self._old_gradients = gradients
        self.grad_norm = norm
        if self._scaler is not None:
            self._scaler.update(overflow=not finite)
        return finite

    def _collect_gradients(self) -> list[Tensor]:
        """Return this rank's gradients; with FSDP, only this rank's shards."""
        return [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _compute_norm(self, gradients: list[Tensor]) -> float:
        """Return the 2-norm of all gradients."""
        if not gradients:
            return 0.0
        # torch's clip_grad_norm_ also uses this private kernel, but takes twice as long.
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))  # noqa: SLF001

    @property
    @override
    def loss_scale(self) -> float:
        return self._scaler.scale if self._scaler else 1.0

    @override
    def save(self, checkpoint_dir: Path, *, frozen: bool = True) -> None:
        from engine.checkpoint import state  # takes 50 ms, so import only if needed

        state.write(checkpoint_dir, self.model, self.optimizer, frozen=frozen)
        if self._scaler is not None and self.ranks.rank == 0:
            write_values(checkpoint_dir / _SCALER, self._scaler.state_dict())

    @override
    def save_async(
        self,
        checkpoint_dir: Path,
        group: dist.ProcessGroup | None,
        buffers: dict[str, Any],
        *,
        frozen: bool = True,
    ) -> Future[None]:
        from engine.checkpoint import state  # takes 50 ms, so import only if needed

        written = state.write_async(
            checkpoint_dir, self.model, self.optimizer, group, buffers, frozen=frozen
        )
        if self._scaler is not None and self.ranks.rank == 0:
            write_values(checkpoint_dir / _SCALER, self._scaler.state_dict())
        return written

    @override
    def load(
        self, checkpoint_dir: Path, *, optimizer: bool, strict: bool, frozen: bool = True
    ) -> None:
        from engine.checkpoint import state  # takes 50 ms, so import only if needed

        trained_by = self.optimizer if optimizer else None
        state.read(checkpoint_dir, self.model, trained_by, strict=strict, frozen=frozen)
        saved = checkpoint_dir / _SCALER
        if optimizer and self._scaler is not None and saved.is_file():
            self._scaler.load_state_dict(read_values(saved))

    @override
    def snapshot(self) -> Any:
        # Copy all buffers, even those that checkpoints leave out.
        tensors_now = {name: tensor.detach().clone() for name, tensor in _named_tensors(self.model)}
        scaler = self._scaler.state_dict() if self._scaler else None
        return copy.deepcopy((tensors_now, self.optimizer.state_dict(), scaler, self.grad_norm))

    @override
    def restore(self, snapshot: Any) -> None:
        tensors_then, optimizer, scaler, self.grad_norm = snapshot
        with torch.no_grad():
            for name, tensor in _named_tensors(self.model):
                if name in tensors_then:  # a forward pass may have added buffers
                    tensor.copy_(tensors_then[name])
        self.optimizer.load_state_dict(optimizer)
        if self._scaler is not None:
            self._scaler.load_state_dict(scaler)

    @override
    def destroy(self) -> None:
        self._parallel = None
        self._forward_module = self.model
        self._old_gradients = []

    @override
    def describe(self) -> str:
        how = f"DDP over {self.ranks.world_size} ranks" if self._parallel else "one process"
        return f"PyTorch, {how}, {self.ranks.device}, {self._config.precision}"


def _prepare_model(model: nn.Module, config: Config, device: torch.device) -> None:
    """Move a model to a device; enable activation checkpointing and compilation if configured."""
    compilers = torch.compiler.list_backends(exclude_tags=()) if config.compile_backend else ()
    if config.compile_backend is not None and config.compile_backend not in compilers:
        raise ValueError(
            f"`engine.compile` must be one of {', '.join(compilers)}, "
            f"got {config.compile_backend!r}. Choose one of these compilers, or remove the key."
        )
    model.to(device)
    if config.activation_checkpointing is not None:
        checkpoint_activations(
            model, config.wrap_classes, on_host=config.activation_checkpointing == "host"
        )
    if config.compile_backend is not None:
        model.compile(backend=config.compile_backend)


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    model_ids = {id(parameter) for parameter in model.parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(parameter) in model_ids for parameter in trained):
        raise ValueError(
            "The optimizer does not train any parameter of `model`. Build the optimizer from "
            "`model.parameters()` after moving the model to its device."
        )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()

"""The PyTorch backend. It trains in one process, or replicates the model on several ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from engine.backends.base import DTYPES, DeferringBackend, compute_norm, get_gradient
from engine.backends.model_setup import check_compiler, check_has_data, set_up_model
from engine.checkpoint.deepspeed_files import DeepSpeedFiles, has_deepspeed_files
from engine.checkpoint.host_copies import copy_to_host, find_waiting
from engine.checkpoint.optimizer_tensors import keep_tensors, move_state
from engine.checkpoint.plain_values import read_as, report_damage, write_values
from engine.checkpoint.structure import (
    check_param_groups,
    check_parameter_states,
    check_same_structure,
)
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.training.deferred_step import (
    DeferredStep,
    can_skip_on_device,
    compute_norm_on_device,
)
from engine.training.gradient_averaging import GradientAverager, find_sparse_weights
from engine.training.loss_scaling import LossScaler, ScalerState
from engine.training.optimizers import NoOptimizer, OptimizerFactory, build_optimizer
from engine.training.precision import autocast_methods, convert_to_float32, restore_methods
from schedules.core.saved_state import restore

__all__ = ["PyTorchBackend"]

log = logging.getLogger("onecycle")

_SCALER = "loss_scaler.pt"


_Snapshot = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None, float | None]


class PyTorchBackend(DeferringBackend):
    """Backend that trains with PyTorch and averages the gradients over all ranks.

    Trainable 16-bit parameters are converted to float32 if ``engine.master_weights`` is true. If
    the config selects bf16 or fp16, the model's methods run under autocast with that dtype.
    Otherwise, they run under autocast with the original dtype of the converted parameters, if any.

    Args:
        model: the user's module; it is moved to ``ranks.device``.
        optimizer: the user's optimizer, or a function that takes the parameters and returns an
            optimizer; if None, the config's optimizer is used.
        config: a validated config.
        ranks: rank, world size and device of this process. If there are several ranks, the process
            group must be initialized.
        parameters: tensors or param groups to train; if None, all parameters that require
            gradients.

    Raises:
        ValueError: a class in ``engine.wrap`` does not match any module of the model,
            ``engine.compile`` is not a known compiler, a parameter or buffer of the model is on the
            meta device, or the user's optimizer does not train any parameter of the model.
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
        self._device = ranks.device
        self._dtype = DTYPES.get(config.precision)
        check_compiler(config.model.compile_backend)
        self._place(model, ranks.device)
        set_up_model(model, config.model)
        trains = optimizer is not None or config.optimizer is not None
        if config.model.master_weights and trains:
            given = optimizer if isinstance(optimizer, Optimizer) else None
            converted_from = convert_to_float32(model.parameters(), given)
            self._dtype = self._dtype or converted_from
        chosen = self._prepare_optimizer(model, optimizer, parameters)
        groups = chosen.param_groups
        super().__init__(
            model, chosen, ranks, num_parameters=sum(p.numel() for g in groups for p in g["params"])
        )
        optimized = {id(p) for group in groups for p in group["params"]}
        self._not_optimized = [p for p in model.parameters() if id(p) not in optimized]
        self._may_have_16_bits = config.model.master_weights and any(
            p.dtype in DTYPES.values() for p in model.parameters()
        )
        self._clipping = config.gradient_clipping
        self._scaler = LossScaler(config.loss_scaling) if config.loss_scaling else None
        self._keeps_gradients = False
        self._old_gradients: list[Tensor] = []
        self._averager = self._build_averager() if ranks.world_size > 1 else None
        if optimizer is None and self._may_defer():
            self._defer_steps()
        self._set_precision()
        self._publish_scale(overflow=False)

    def _place(self, model: nn.Module, device: torch.device) -> None:
        """Move the model to the rank's device."""
        check_has_data(model)
        model.to(device)

    def _prepare_optimizer(
        self,
        model: nn.Module,
        optimizer: Optimizer | OptimizerFactory | None,
        parameters: list[Any] | None,
    ) -> Optimizer:
        if isinstance(optimizer, Optimizer):
            _check_parameters(model, optimizer)
            move_state(optimizer)
            return optimizer
        if parameters is None:
            parameters = [p for p in model.parameters() if p.requires_grad]
        if optimizer is not None:
            return optimizer(parameters)
        if self._config.optimizer is None:
            return NoOptimizer()
        may_fuse = not find_sparse_weights(model)
        return build_optimizer(self._config.optimizer, parameters, may_fuse=may_fuse)

    def _build_averager(self) -> GradientAverager | None:
        """Build a gradient averager, or return None if FSDP averages the gradients."""
        return GradientAverager(self.model, self.optimizer, self.ranks)

    def _may_defer(self) -> bool:
        wanted = self._config.model.deferred_step
        is_wanted = self.ranks.device.type != "cpu" if wanted is None else wanted
        return is_wanted and can_skip_on_device(self.optimizer, self.ranks.device)

    def _defer_steps(self) -> None:
        self.deferred = DeferredStep(
            self.optimizer, self._clipping, self._scaler, self.ranks.device
        )
        if self._averager is not None:
            self._averager.checks_every_step = False

    def _set_precision(self) -> None:
        """Make the model's methods compute in the precision that the config selects."""
        if self._dtype is not None:
            autocast_methods(self.model, self.ranks.device.type, self._dtype)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._move_inputs(args, kwargs)
        return self.model(*args, **kwargs)

    @override
    def backward(
        self, loss: Tensor, accumulation: int, *, is_last: bool, retain_graph: bool = False
    ) -> None:
        scaled = self.scale(loss, accumulation, is_last=is_last)
        if is_last and self._averager is not None:
            with self._averager.overlap():
                scaled.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # untyped in torch
        else:
            scaled.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]

    @override
    def scale(self, loss: Tensor, accumulation: int, *, is_last: bool) -> Tensor:
        del is_last  # `step` averages what no call to `backward` has averaged
        self._old_gradients, self._keeps_gradients = [], self._is_on_cpu
        if self._scaler is not None and loss.dtype == torch.float16:
            (self.deferred or self._scaler).limit_to_float16()
        if self.deferred is not None and self.deferred.scale is not None:
            return loss.float() * (self.deferred.scale / accumulation)
        factor = self.loss_scale / accumulation
        # Multiply in float32: a 16-bit product would overflow or lose precision.
        return loss if factor == 1.0 else loss.float() * factor

    @override
    def step(self, *, divide_by: int = 1) -> bool:
        gradients = self._prepare_gradients()
        scaler = self._scaler
        scale = divide_by if scaler is None else scaler.scale * divide_by
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
            # page faults would slow the next backward pass. Gradients that are freed just before
            # the next backward pass leave memory that malloc reuses.
            self._old_gradients = gradients
        self.grad_norm = norm
        if scaler is not None:
            scaler.update(overflow=not finite)
        self._publish_scale(overflow=not finite)
        return finite

    def _prepare_gradients(self) -> list[Tensor]:
        """Finish averaging the gradients, and return them."""
        if self._may_have_16_bits:
            self._convert_unfrozen()
        if self._averager is not None:
            self._averager.finish()
        return self._collect_gradients()

    @override
    def start_step(self, loss: Tensor | None, *, divide_by: int = 1) -> None:
        assert self.deferred is not None
        gradients = self._prepare_gradients()
        scale = self.loss_scale * divide_by
        norm = self._compute_norm_on_device(gradients) / scale
        if loss is not None and self.ranks.world_size > 1:
            # All-reduce the loss now, because ranks may read it at different times without waiting.
            loss = loss.to(self.ranks.device, torch.float64) / self.ranks.world_size
            dist.all_reduce(loss)
        self.deferred.start(norm, scale, loss)
        self.zero_grad()
        if self._keeps_gradients:
            self._old_gradients = gradients

    @override
    def finish_step(self) -> tuple[bool, float]:
        assert self.deferred is not None
        try:
            self.grad_norm, loss = self.deferred.read()
        finally:
            self._publish_scale(overflow=self.deferred.has_skipped)
        return not self.deferred.has_skipped, loss

    def _publish_scale(self, *, overflow: bool) -> None:
        """Set the optimizer attributes that DeepSpeed scripts expect, such as ``loss_scale``."""
        optimizer: Any = self.optimizer
        optimizer.overflow = overflow
        optimizer.cur_scale = optimizer.loss_scale = self._scaler.scale if self._scaler else 1.0

    @override
    def get_attribute(self, name: str) -> Any:
        return self._average if name == "allreduce_gradients" else super().get_attribute(name)

    def _average(self) -> None:
        if self._averager is not None:
            self._averager.average()

    def _collect_gradients(self) -> list[Tensor]:
        """Return the gradients of all parameters of the optimizer.

        With FSDP, return only this rank's shards of the gradients.
        """
        return [
            get_gradient(parameter) if parameter.grad.is_sparse else parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _compute_norm(self, gradients: list[Tensor]) -> float:
        return compute_norm(gradients)

    def _compute_norm_on_device(self, gradients: list[Tensor]) -> Tensor:
        return compute_norm_on_device(gradients, self.ranks.device)

    def _convert_unfrozen(self) -> None:
        """Convert 16-bit parameters to float32 if they were unfrozen after the run started."""
        for group in self.optimizer.param_groups:
            convert_to_float32((p for p in group["params"] if p.grad is not None), self.optimizer)

    @override
    def zero_grad(self) -> None:
        if getattr(self.optimizer.zero_grad, "__func__", None) is Optimizer.zero_grad:
            # PyTorch's method also records a range for the profiler, which takes much longer.
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            super().zero_grad()
        for parameter in self._not_optimized:  # gradients that would add up until they are used
            if parameter.grad is not None:
                parameter.grad.zero_()

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
        if has_deepspeed_files(checkpoint_dir):
            with report_damage(checkpoint_dir):
                self._load_deepspeed_files(checkpoint_dir, trained_by, strict=strict, frozen=frozen)
            return
        path, scaler = checkpoint_dir / _SCALER, self._scaler if optimizer else None
        saved = read_as(ScalerState, path) if scaler is not None and path.is_file() else None
        state.read(checkpoint_dir, self.model, trained_by, strict=strict, frozen=frozen)
        if scaler is not None and saved is not None:
            scaler.load_state_dict(saved)
            self._publish_scale(overflow=False)

    def _load_deepspeed_files(
        self, checkpoint_dir: Path, optimizer: Optimizer | None, *, strict: bool, frozen: bool
    ) -> None:
        from engine.checkpoint import state
        from engine.checkpoint.deepspeed_source import DeepSpeedSource, has_states_for

        files = DeepSpeedFiles(checkpoint_dir, trusts=self._config.checkpoint.trust_pickle)
        if optimizer is not None and not optimizer.param_groups:  # the model is not trained
            optimizer = None
        if optimizer is not None and not has_states_for(optimizer, files, self.model):
            name = type(optimizer).__name__
            log.warning(
                "the optimizer state was not restored, because %s does not contain a state that "
                "%s can load",
                checkpoint_dir,
                name,
            )
            optimizer = None
        uses_scaler = optimizer is not None and self._scaler is not None
        scaler = files.read_loss_scaler() if uses_scaler else None
        if scaler is not None:
            restore(ScalerState, scaler, "loss_scaler")
        source = DeepSpeedSource(files, self.model, self.optimizer)
        state.read(
            checkpoint_dir, self.model, optimizer, strict=strict, frozen=frozen, source=source
        )
        if self._scaler is not None and scaler is not None:
            self._scaler.load_state_dict(scaler)
            self._publish_scale(overflow=False)

    @override
    def snapshot(self, reuse: Any = None) -> Any:
        # Copy all buffers, even those that checkpoints leave out.
        tensors_now = dict(_named_tensors(self.model))
        scaler = self._scaler.state_dict() if self._scaler else None
        state = tensors_now, self.optimizer.state_dict(), scaler, self.grad_norm
        # The copies are in host memory, so a snapshot does not use GPU memory.
        copies = copy_to_host(state, reuse)
        find_waiting(state)()
        return copies

    def _check_snapshot(self, snapshot: Any) -> None:
        tensors_then, optimizer, scaler, _ = restore(_Snapshot, snapshot, "snapshot")
        # A forward pass may have added buffers since the snapshot was taken.
        buffers = {name: each for name, each in self.model.named_buffers() if name in tensors_then}
        own = dict(self.model.named_parameters()) | buffers
        check_same_structure(tensors_then, own, "model")
        parameters = dict(enumerate(p for g in self.optimizer.param_groups for p in g["params"]))
        check_param_groups(optimizer["param_groups"], self.optimizer.state_dict()["param_groups"])
        check_parameter_states(
            optimizer["state"], optimizer["param_groups"], self.optimizer, parameters
        )
        if self._scaler is not None:
            restore(ScalerState, scaler, "loss_scaler")

    @override
    def restore(self, snapshot: Any, *, only_check: bool = False) -> None:
        if only_check:
            self._check_snapshot(snapshot)
            return
        tensors_then, optimizer, scaler, self.grad_norm = snapshot
        with torch.no_grad():
            for name, tensor in _named_tensors(self.model):
                if name in tensors_then:  # a forward pass may have added buffers
                    tensor.copy_(tensors_then[name])
        with keep_tensors(self.optimizer):
            self.optimizer.load_state_dict(optimizer)
        if self._scaler is not None:
            self._scaler.load_state_dict(scaler)
            self._publish_scale(overflow=False)

    @override
    def destroy(self) -> None:
        if self._averager is not None:
            self._averager.release()
        restore_methods(self.model)
        self._old_gradients = []

    @override
    def describe(self) -> tuple[str, str]:
        count = self.ranks.world_size
        how = f"replicated on {count} ranks" if count > 1 else "one process"
        return f"PyTorch, {how}", self._describe_precision()

    def _describe_precision(self) -> str:
        if self._dtype is None or self._config.precision != "fp32":
            return self._config.precision
        return f"fp32 weights, computing in {str(self._dtype).removeprefix('torch.')}"


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

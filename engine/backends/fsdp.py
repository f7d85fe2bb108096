"""The FSDP2 backend: PyTorch with parameters, gradients and optimizer states sharded across ranks.

FSDP2 implements ZeRO's stages as follows. Stage 3 gathers a block's parameters for the forward pass
and again for the backward pass. Stage 2 keeps them between the two passes. Stage 1 also keeps
them, and reduces gradients only once per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from engine.backends.base import DTYPES
from engine.backends.pytorch import PyTorchBackend
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.training.activation_checkpointing import find_blocks
from engine.training.optimizers import OptimizerFactory

__all__ = ["FSDPBackend", "check_gradient_averaging", "shard"]


class FSDPBackend(PyTorchBackend):
    """Backend that shards the model across ranks with FSDP2 (ZeRO stages 1 to 3)."""

    @override
    def _prepare_optimizer(
        self,
        model: nn.Module,
        optimizer: Optimizer | OptimizerFactory | None,
        parameters: list[Any] | None,
    ) -> Optimizer:
        # Sharding replaces the model's parameters, so shard before building the optimizer.
        if not isinstance(optimizer, Optimizer):
            sharded = shard(model, self._config, parameters)
            return super()._prepare_optimizer(model, optimizer, sharded)
        groups = shard(model, self._config, optimizer.param_groups)
        for group, sharded_group in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = sharded_group["params"]
        return optimizer

    @override
    def _set_up_averaging(self) -> None:
        check_gradient_averaging(self.ranks)  # FSDP averages gradients without a wrapper

    @override
    def forward(self, *args: Any, last_micro_batch: bool, **kwargs: Any) -> Any:
        # FSDP's mixed-precision policy casts the tensors, so autocast is not needed. Stages 2 and 3
        # reduce gradients after every micro-batch, since they do not store unsharded ones.
        if self._config.zero_stage == 1:
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(last_micro_batch)
        return self._forward_module(*args, **kwargs)

    @override
    def _collect_gradients(self) -> list[Tensor]:
        return [_to_local(gradient) for gradient in super()._collect_gradients()]

    @override
    def _compute_norm(self, gradients: list[Tensor]) -> float:
        local_norm = super()._compute_norm(gradients)
        squares = torch.tensor(local_norm**2, dtype=torch.float64, device=self.ranks.device)
        dist.all_reduce(squares)
        return math.sqrt(float(squares))

    @override
    def describe(self) -> str:
        ranks = self.ranks
        stage = f"FSDP2, stage {self._config.zero_stage}, over {ranks.world_size} ranks"
        return f"PyTorch, {stage}, {ranks.device}, {self._config.precision}"


def shard(model: nn.Module, config: Config, parameters: Iterable[Any] | None) -> list[Any]:
    """Shard a model's parameters across ranks, in place, and return the parameters to train.

    As with DDP, all ranks start with rank 0's values.

    Args:
        model: module on its device.
        config: config with the ZeRO stage, the precision, offloading and ``engine.wrap``.
        parameters: unsharded tensors or param groups to train; if None, all that require gradients.

    Returns:
        The sharded parameters to train, in the structure of ``parameters``.

    Raises:
        ValueError: a parameter does not belong to the model, or the model contains none of the
            classes in ``engine.wrap``.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = None if parameters is None else list(parameters)
    dtype = DTYPES.get(config.precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    on_host = next(model.parameters()).device.type == "cpu"
    offload = CPUOffloadPolicy() if config.cpu_offload and not on_host else OffloadPolicy()
    settings: dict[str, Any] = {
        "reshard_after_forward": config.zero_stage == 3,
        "mp_policy": policy,
        "offload_policy": offload,
    }
    for block in find_blocks(model, config.wrap_classes):
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    sharded = dict(model.named_parameters())
    if wanted is None:
        return [parameter for parameter in sharded.values() if parameter.requires_grad]
    return [_to_sharded(each, names, sharded) for each in wanted]


def _to_sharded(each: Any, names: dict[int, str], sharded: dict[str, nn.Parameter]) -> Any:
    if isinstance(each, dict):
        return {**each, "params": [_to_sharded(p, names, sharded) for p in each["params"]]}
    if id(each) not in names:
        raise ValueError(
            f"`model_parameters` contains a tensor of shape {tuple(each.shape)} that is not a "
            "parameter of `model`. Pass only tensors from `model.parameters()`."
        )
    return sharded[names[id(each)]]


def _to_local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def check_gradient_averaging(ranks: Ranks) -> None:
    """Check that FSDP averages gradients over the ranks. Some builds of torch do not.

    Raises:
        RuntimeError: FSDP's gradient of a test weight is not the mean of the ranks' gradients.
    """
    probe = nn.Linear(ranks.world_size, 1, bias=False, device=ranks.device)
    fully_shard(probe)
    given = torch.full((1, ranks.world_size), float(ranks.rank + 1), device=ranks.device)
    probe(given).sum().backward()
    gradient = probe.weight.grad
    assert isinstance(gradient, DTensor)
    expected = (ranks.world_size + 1) / 2
    mean = gradient.full_tensor()
    if not torch.allclose(mean, torch.full_like(mean, expected)):
        raise RuntimeError(
            f"This build of torch does not average FSDP gradients on {ranks.device.type}: a test "
            f"gradient must be {expected:g}, got {mean.flatten().tolist()}. Set "
            '"zero_optimization": {"stage": 0}, or upgrade torch.'
        )

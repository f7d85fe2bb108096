"""PyTorch with parameters, gradients and optimizer states divided among the ranks (FSDP2).

ZeRO's stages by PyTorch's own means: 3 gathers a block's parameters for the forward pass and again
for the backward pass, 2 keeps them in between, 1 reduces gradients only once an update besides.
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

from engine.backends.base import DTYPES
from engine.backends.pytorch import PyTorchBackend
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.training.activation_checkpointing import blocks_of

__all__ = ["ShardedBackend", "shard"]


class ShardedBackend(PyTorchBackend):
    """Trains a model that `shard` has divided; the optimizer is of its new parameters."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, config: Config, ranks: Ranks
    ) -> None:
        super().__init__(model, optimizer, config, ranks)
        self._autocast = None  # the policy of `shard` casts
        self._stage = config.zero_stage
        _prove_averaging(ranks)

    def _replicated(self) -> None:
        return None

    def forward(self, *args: Any, last_micro_batch: bool, **kwargs: Any) -> Any:
        """Call the model; in stage 1, ranks meet only in the last micro-batch."""
        if self._stage == 1:
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(last_micro_batch)
        return self._called(*args, **kwargs)

    def _gradients(self) -> list[Tensor]:
        return [_local(gradient) for gradient in super()._gradients()]

    def _norm(self, gradients: list[Tensor]) -> float:
        own = super()._norm(gradients)
        squares = torch.tensor(own**2, dtype=torch.float64, device=self.ranks.device)
        dist.all_reduce(squares)
        return math.sqrt(float(squares))

    def describe(self) -> str:
        """Return what trains here, in words, for the log."""
        ranks = self.ranks
        stage = f"FSDP2, stage {self._stage}, over {ranks.world_size} ranks"
        return f"PyTorch, {stage}, {ranks.device}, {self._precision}"


def shard(model: nn.Module, config: Config, parameters: Iterable[Any] | None) -> list[Any]:
    """Divide a model's parameters among the ranks, in place; return the parameters to train.

    All ranks begin with rank 0's values, as under DDP.

    Args:
        model: on its device.
        config: for the stage, the precision, offloading, and the classes of blocks in
            ``engine.wrap``.
        parameters: what was to be trained, tensors or param groups; None: all that need gradients.

    Returns:
        The same in terms of the divided parameters.

    Raises:
        ValueError: a parameter is none of the model's, or no module is of a class to wrap.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = None if parameters is None else list(parameters)
    dtype = DTYPES.get(config.precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    on_host = next(model.parameters()).device.type == "cpu"
    offload = CPUOffloadPolicy() if config.offloads and not on_host else OffloadPolicy()
    settings: dict[str, Any] = {
        "reshard_after_forward": config.zero_stage == 3,
        "mp_policy": policy,
        "offload_policy": offload,
    }
    for block in blocks_of(model, config.wrap):
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    divided = dict(model.named_parameters())
    if wanted is None:
        return [parameter for parameter in divided.values() if parameter.requires_grad]
    return [_translated(each, names, divided) for each in wanted]


def _translated(each: Any, names: dict[int, str], divided: dict[str, nn.Parameter]) -> Any:
    if isinstance(each, dict):
        return {**each, "params": [_translated(p, names, divided) for p in each["params"]]}
    if id(each) not in names:
        raise ValueError(
            "`model_parameters` must be the model's own, but hold a tensor of shape "
            f"{tuple(each.shape)} that is none of them."
        )
    return divided[names[id(each)]]


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _prove_averaging(ranks: Ranks) -> None:
    """Prove on one weight that gradients are averaged over the ranks: libraries got it wrong.

    Raises:
        RuntimeError: the mean of the ranks' gradients is another number here.
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
            f"the mean of the ranks' gradients must be {expected:g} in a trial of one weight, but "
            f"is {mean.flatten().tolist()} instead: this build of torch does not average on "
            f'{ranks.device.type}. Set "zero_optimization": {{"stage": 0}}, or update torch.'
        )

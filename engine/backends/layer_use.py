"""Check that all ranks train the same layers of a model that FSDP2 shards."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from engine.distributed.ranks import Ranks, gather_if_different
from engine.errors import MisuseError
from engine.training.gradient_averaging import is_check_due

__all__ = ["LayerUse"]

_RECORDED_CALLS = 10_000


class LayerUse:
    """Record of the layers that this rank has trained since its last optimizer step.

    To gather parameters and to average gradients, FSDP2 matches the calls of the ranks only by
    their order. If ranks use different layers, it silently mixes up parameters of the same size.
    The ranks compare their records in every step, or only in the first three steps and in every
    hundredth if `checks_every_step` is false.

    Args:
        model: model that FSDP2 shards.
        optimizer: optimizer that holds the model's parameters.
        ranks: rank and world size of this process.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        self._model = model
        self._optimizer = optimizer
        self._ranks = ranks
        self._steps = 0
        self.checks_every_step = ranks.device.type == "cpu"
        """Whether the ranks compare their records in every step.

        True by default only on the CPU, because on a GPU the comparison blocks the host.
        """
        # A script that never steps must not fill the memory.
        self._order: deque[str] = deque(maxlen=_RECORDED_CALLS)
        sharded = {name for name, each in model.named_modules() if isinstance(each, FSDPModule)}
        self._hooks = [
            model.get_submodule(name).register_forward_hook(
                functools.partial(self._on_forward, name)
            )
            for name in sharded
        ]

    def _on_forward(self, name: str, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        """Record a call when its backward pass starts.

        A forward pass alone may be run on one rank only, as long as no parameters are gathered.
        """
        if torch.compiler.is_compiling():  # the hook would split the graph
            return
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _gradient: self._order.append(name))  # type: ignore[no-untyped-call]  # untyped in torch
                return

    def check(self) -> None:
        """Check that all ranks have used the same layers, and forget the record.

        Raises:
            MisuseError: the ranks have called different layers, have called them in different
                orders, or have gradients for different parameters.
        """
        order = list(self._order)
        self._order.clear()
        self._steps += 1
        if not self.checks_every_step and not is_check_due(self._steps):
            return
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        used = [index for index, each in enumerate(trained) if each.grad is not None]
        found = gather_if_different(self._ranks, (order, used))
        if found:
            raise MisuseError(
                f"The ranks have used different layers in this step: {self._describe(found)}. "
                "FSDP2 requires that all ranks call the same layers in the same order. Call "
                'them on every rank, or set "zero_optimization": {"stage": 0}.'
            )

    def _describe(self, found: list[Any]) -> str:
        """Return the first difference between rank 0 and another rank."""
        rank = next(rank for rank, each in enumerate(found) if each != found[0])
        (order, used), (other_order, other_used) = found[0], found[rank]
        if differing := sorted(set(used) ^ set(other_used)):
            trained = [p for group in self._optimizer.param_groups for p in group["params"]]
            names = {id(parameter): name for name, parameter in self._model.named_parameters()}
            name = names.get(id(trained[differing[0]]), "a parameter")
            has, lacks = (0, rank) if differing[0] in used else (rank, 0)
            return f"`{name}` has a gradient on rank {has}, but not on rank {lacks}"
        pairs = enumerate(zip(order, other_order, strict=False))
        call = next((i for i, (one, other) in pairs if one != other), None)
        if call is None:
            return (
                f"rank 0 has run {len(order)} backward passes through layers, and rank {rank} "
                f"{len(other_order)}"
            )
        other = f"through `{other_order[call]}` on rank {rank}"
        return f"backward pass {call + 1} is through `{order[call]}` on rank 0, and {other}"

    def release(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

"""Activation checkpointing for the PyTorch and FSDP2 backends."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["CheckpointedForward", "checkpoint_activations", "find_blocks"]

log = logging.getLogger("onecycle")


def checkpoint_activations(
    model: nn.Module, wrap: Sequence[str] = (), *, on_host: bool = False
) -> None:
    """Enable activation checkpointing for a model's blocks, in place.

    Each block saves only its inputs and is recomputed in the backward pass. The random state is
    restored for the recomputation, so dropout drops the same values. If the model has no blocks,
    a warning is logged.

    Args:
        model: module with the blocks to checkpoint.
        wrap: class names of the blocks; see `find_blocks`.
        on_host: whether to move the saved inputs to CPU memory.

    Raises:
        ValueError: a class name in ``wrap`` does not match any module of the model.
    """
    blocks = find_blocks(model, wrap)
    if not blocks:
        log.warning(
            "`activation_checkpointing` has no effect, because the model has no ModuleList with "
            "at least two members, all of the same class; list the class names of the layers in "
            "`engine.wrap`"
        )
    for block in blocks:
        block.forward = CheckpointedForward(block.forward, on_host=on_host)


class CheckpointedForward:
    """A block's ``forward`` with activation checkpointing.

    If a block is copied or unpickled, the new block gets its own ``forward``, which uses the
    weights of the new block.

    Args:
        forward: bound ``forward`` method of a block.
        on_host: whether to move the saved inputs to CPU memory.
    """

    __wrapped__: Callable[..., Any]

    def __init__(self, forward: Callable[..., Any], *, on_host: bool) -> None:
        functools.update_wrapper(self, forward)
        self.on_host = on_host

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block. Activation checkpointing is used only if gradients are enabled."""
        if not torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        storage: Any = contextlib.nullcontext()
        if self.on_host:
            storage = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
        with storage:
            # PyTorch restores the random state only for devices of positional arguments, so pass
            # the keyword arguments as a positional argument.
            return checkpoint(self._call, args, kwargs, use_reentrant=False)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.__wrapped__(*args, **kwargs)


def find_blocks(model: nn.Module, wrap: Sequence[str] = ()) -> list[nn.Module]:
    """Return a model's blocks: the modules to shard or checkpoint individually.

    Args:
        model: any module.
        wrap: class names of the blocks. If empty, the blocks are the members of each ModuleList
            with at least two members, all of the same class, such as the layers of a transformer.

    Raises:
        ValueError: a class name in ``wrap`` does not match any module of the model.

    >>> layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    >>> len(find_blocks(nn.Sequential(layers, nn.Tanh())))
    3
    """
    if wrap:
        found = [module for module in model.modules() if type(module).__name__ in wrap]
        missing = sorted(set(wrap) - {type(module).__name__ for module in found})
        if missing:
            raise ValueError(
                f"`engine.wrap` must name classes of the model's modules, got {missing}. "
                "Use class names that `print(model)` shows."
            )
        return found
    blocks = []
    for module in model.modules():
        members = list(module.children()) if isinstance(module, nn.ModuleList) else []
        if len(members) > 1 and len({type(member) for member in members}) == 1:
            blocks += [member for member in members if any(True for _ in member.parameters())]
    return blocks

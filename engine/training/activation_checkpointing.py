"""Activation checkpointing on PyTorch, and the blocks of a model that it applies to."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_activations", "find_blocks"]


def checkpoint_activations(
    model: nn.Module, wrap: Sequence[str] = (), *, on_host: bool = False
) -> None:
    """Let each block save only its inputs and recompute its forward pass in the backward pass.

    The random state is restored for the recomputation, so that dropout is the same.

    Args:
        model: module whose blocks are checkpointed, in place.
        wrap: class names of the blocks, see `find_blocks`.
        on_host: whether the saved inputs are moved to the host's memory.

    Raises:
        ValueError: the model has no blocks.
    """
    blocks = find_blocks(model, wrap)
    if not blocks:
        raise ValueError(
            "`activation_checkpointing` must have blocks to compute again, but the model has no "
            'list of modules of one class; name their classes in "engine": {"wrap": […]}.'
        )
    for block in blocks:
        block.forward = _checkpointed(block.forward, on_host=on_host)


def _checkpointed(forward: Any, *, on_host: bool) -> Any:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        keeps = torch.autograd.graph.save_on_cpu() if on_host else contextlib.nullcontext()
        with keeps:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def find_blocks(model: nn.Module, wrap: Sequence[str] = ()) -> list[nn.Module]:
    """Return a model's blocks, which are sharded or checkpointed one at a time.

    Args:
        model: any module.
        wrap: class names of the blocks; if empty, the blocks are the members of every ModuleList
            that holds two or more modules of one class, such as the layers of a transformer.

    Raises:
        ValueError: no module is of a class in ``wrap``.

    >>> layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    >>> len(find_blocks(nn.Sequential(layers, nn.Tanh())))
    3
    """
    if wrap:
        found = [module for module in model.modules() if type(module).__name__ in wrap]
        if not found:
            raise ValueError(
                f"`engine.wrap` must name classes of the model's modules, but it has no "
                f"{' or '.join(wrap)}."
            )
        return found
    blocks = []
    for module in model.modules():
        members = list(module.children()) if isinstance(module, nn.ModuleList) else []
        if len(members) > 1 and len({type(member) for member in members}) == 1:
            blocks += [member for member in members if any(True for _ in member.parameters())]
    return blocks

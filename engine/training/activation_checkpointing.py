"""Activation checkpointing on PyTorch, and the blocks of a model that it applies to."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["blocks_of", "recompute"]


def recompute(blocks: Iterable[nn.Module], *, on_host: bool) -> int:
    """Let each block keep its inputs alone, and run again in the backward pass; return how many.

    Random numbers are drawn again as they were, so that dropout is the same.

    Args:
        blocks: modules, such as the layers of a transformer.
        on_host: whether the inputs that are kept are moved to the host's memory.
    """
    count = 0
    for block in blocks:
        block.forward = _recomputed(block.forward, on_host=on_host)
        count += 1
    return count


def _recomputed(forward: Any, *, on_host: bool) -> Any:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        keeps = torch.autograd.graph.save_on_cpu() if on_host else contextlib.nullcontext()
        with keeps:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def blocks_of(model: nn.Module, wrap: Sequence[str] = ()) -> list[nn.Module]:
    """Return the modules that are gathered one at a time.

    They are of the classes that ``wrap`` names, or else the members of each list of two or more
    modules of one class, which is how transformers keep their layers.

    Raises:
        ValueError: no module is of a class in ``wrap``.

    >>> layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    >>> len(blocks_of(nn.Sequential(layers, nn.Tanh())))
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

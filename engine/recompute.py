"""Activation checkpointing on PyTorch: blocks forget their activations and compute them again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute"]


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

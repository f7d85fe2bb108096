"""Unwrap models returned by `torch.compile`, and compile the wrapped modules in place instead."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["unwrap_compiled"]


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """Remove the wrapper that `torch.compile` adds, and compile the wrapped module in place.

    The wrapper adds ``_orig_mod.`` to the keys of the state dict, so an uncompiled model could not
    load the wrapper's checkpoints. A model that is not wrapped is returned unchanged.

    >>> import torch
    >>> inner = nn.Linear(2, 1)
    >>> unwrap_compiled(torch.compile(inner, backend="eager")) is inner
    True
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    if dynamo is None or not isinstance(model, dynamo.OptimizedModule):
        return model
    wrapper: Any = model
    inner: nn.Module = wrapper._orig_mod  # noqa: SLF001  # private in torch
    # Compile like `nn.Module.compile`, with the backend and the options of the wrapper.
    inner._compiled_call_impl = wrapper.dynamo_ctx(inner._call_impl)  # noqa: SLF001  # private
    return inner

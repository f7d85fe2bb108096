"""Unwrap models that `torch.compile` returned, and keep their modules compiled."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["unwrap_compiled"]


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """Return the module inside a compiled model, set up to run compiled without the wrapper.

    The wrapper adds ``_orig_mod.`` to the keys of the state dict, so a checkpoint of the wrapper
    could not be loaded into a model that is not compiled. If the model is not compiled, return the
    model unchanged.

    >>> import torch
    >>> inner = nn.Linear(2, 1)
    >>> unwrap_compiled(torch.compile(inner, backend="eager")) is inner
    True
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    if dynamo is None or not isinstance(model, dynamo.OptimizedModule):
        return model
    wrapper: Any = model
    inner: nn.Module = wrapper._orig_mod  # noqa: SLF001  # it has no public name
    # As `nn.Module.compile` does, with the backend and the options of the wrapper.
    inner._compiled_call_impl = wrapper.dynamo_ctx(inner._call_impl)  # noqa: SLF001
    return inner

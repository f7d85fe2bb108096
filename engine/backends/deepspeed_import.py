"""Import DeepSpeed without its CPU all-reduce op, and suspend its ``zero.Init`` context.

Compiling the op can take minutes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["import_deepspeed", "import_for_config", "suspend_zero_init"]


def import_deepspeed() -> Any:
    """Import and return the package ``deepspeed``.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    import deepspeed
    from deepspeed.ops.op_builder import ShareMemCommBuilder

    # Otherwise, DeepSpeed spends minutes compiling a faster all-reduce in the first CPU run.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    return deepspeed


def import_for_config() -> Any:
    """Import and return the package ``deepspeed``, for a config that needs DeepSpeed.

    Raises:
        ImportError: DeepSpeed cannot be imported. The message explains how to run without
            DeepSpeed.
    """
    try:
        return import_deepspeed()
    except ImportError as error:
        raise ImportError(
            f"This config needs DeepSpeed, but importing DeepSpeed failed: {error}. Run `pip "
            'install deepspeed`, or set "engine": {"backend": "torch"} and remove the keys that '
            "only DeepSpeed supports."
        ) from error


@contextlib.contextmanager
def suspend_zero_init() -> Iterator[None]:
    """Suspend an active ``deepspeed.zero.Init`` context, as ``deepspeed.initialize`` does.

    An active context shards each new module. It also changes the dtype of each new tensor,
    including the tensors in an optimizer's state.
    """
    module: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    context = getattr(module, "top_level_context", None)
    if context is None:
        yield
        return
    context.unpatch_init_and_builtins()
    # Otherwise, `deepspeed.initialize` would restore the context before this function does.
    module.top_level_context = None
    try:
        yield
    finally:
        module.top_level_context = context
        context.patch_init_and_builtins()

"""Register our schedules with DeepSpeed, for scripts that use it directly or via accelerate."""

from __future__ import annotations

import functools

__all__ = ["register_with_deepspeed"]


def register_with_deepspeed(*, replace: bool = False) -> list[str]:
    """Register our schedules, so that ``deepspeed.initialize`` accepts them as ``scheduler.type``.

    DeepSpeed looks up the type in its module ``deepspeed.runtime.lr_schedules`` and calls the
    scheduler's ``step()`` after every optimizer step that it does not report as skipped. Specify
    durations as numbers of steps: a string such as "10ep" needs the length of an epoch, which
    DeepSpeed does not provide.

    Args:
        replace: whether to also replace DeepSpeed's five schedules with ours of the same names.

    Returns:
        The names of the registered schedules.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    from deepspeed.runtime import lr_schedules

    from schedules import SCHEDULES
    from schedules.torch_scheduler import attach

    names = [name for name in SCHEDULES if replace or not hasattr(lr_schedules, name)]
    for name in names:
        setattr(lr_schedules, name, functools.partial(attach, name))
    return names

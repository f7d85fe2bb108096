"""Register onecycle's schedules with DeepSpeed, for scripts that call ``deepspeed.initialize``."""

from __future__ import annotations

import functools

__all__ = ["register_with_deepspeed"]


def register_with_deepspeed(*, replace: bool = False) -> list[str]:
    """Register onecycle's schedules with DeepSpeed, for ``deepspeed.initialize`` and Accelerate.

    After this call, ``scheduler.type`` in the config accepts the names of the schedules. The
    schedule does not advance when DeepSpeed reports an optimizer step as skipped. Specify durations
    as numbers of steps. A string such as "10ep" (10 epochs) requires the number of steps per epoch,
    which DeepSpeed does not provide.

    Args:
        replace: whether to replace DeepSpeed's own five schedules with onecycle's versions.

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

"""Our schedules for plain DeepSpeed, and for what builds its config: transformers, accelerate."""

from __future__ import annotations

import functools

__all__ = ["register_with_deepspeed"]


def register_with_deepspeed(*, replace: bool = False) -> list[str]:
    """Let ``deepspeed.initialize`` find every schedule of ours by its ``scheduler.type``.

    DeepSpeed looks for a type in its module ``deepspeed.runtime.lr_schedules``; it steps what it
    finds after each update that it counts as applied. Durations are to be counts of updates there:
    a string like "10ep" needs a run, which DeepSpeed does not tell.

    Args:
        replace: whether ours take the place of DeepSpeed's own five of the same names too.

    Returns:
        The names that were put there.

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

"""Log the training setup when a run starts."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence

from torch.optim.lr_scheduler import LRScheduler

from engine.config import Config
from engine.config.named_code import find_named_code, find_optimizer_code
from engine.config.param_groups import find_group_schedulers
from engine.display.param_groups import GroupRow, format_param_groups
from schedules import ScheduleBinder
from schedules.families.per_group import PerGroup

__all__ = ["enable_logging", "log_setup"]

log = logging.getLogger("onecycle")

_WIDTH = 95
_NAME_WIDTH = 12


def log_setup(
    config: Config,
    *,
    backend: str,
    device: str,
    precision: str,
    optimizer: str | None,
    num_parameters: int,
    scheduler: LRScheduler | None,
    replacements: Sequence[str] = (),
    param_groups: Sequence[GroupRow] = (),
) -> dict[str, str]:
    """Log the config's overrides and warnings, and a table of the training setup.

    Args:
        config: a validated config.
        backend: description of the backend.
        device: device of rank 0.
        precision: precision of weights and computation.
        optimizer: name of the optimizer; None if the engine only runs inference.
        num_parameters: number of elements in all trainable parameters.
        scheduler: scheduler of the run; None if it has none.
        replacements: messages about config sections that arguments of `initialize` replace.
        param_groups: param groups that the config describes. They are logged below the table.

    Returns:
        The rows of the table, as a dict that maps the name of each row to its text.
    """
    codes = [*find_optimizer_code(config.raw.get("optimizer"))]
    blocks = [("/scheduler", config.raw.get("scheduler"))]
    blocks += [(pointer, block) for _, pointer, block in find_group_schedulers(config.raw)]
    for pointer, block in blocks:
        codes += find_named_code(block, pointer)
    for code in codes:
        log.info("imported %s, as specified by %s in %s", code.name, code.pointer, config.name)
    for override in (*config.overrides, *replacements):
        log.info("%s", override)
    for problem in config.warnings:
        log.warning("%s: %s", config.name, problem)
    norm = config.gradient_clipping
    default = "" if "gradient_clipping" in config.raw else " (default)"
    clipping = f", gradients clipped to norm {norm:g}{default}" if norm else ""
    setup = {
        "backend": f"{backend} ({config.backend.reason})",
        "device": device,
        "precision": precision,
        "batch": str(config.batch).removeprefix("batch size "),
        "optimizer": "none (inference)" if optimizer is None else f"{optimizer}{clipping}",
        "schedule": _describe_schedule(scheduler, config.name),
        "parameters": f"{num_parameters:,}",
        "checkpoints": _describe_checkpoints(config),
    }
    if config.keys_without_effect:
        setup["no effect"] = ", ".join(config.keys_without_effect)
    for name, text in setup.items():
        first, *others = textwrap.wrap(text, _WIDTH - _NAME_WIDTH, break_on_hyphens=False)
        log.info("%-*s %s", _NAME_WIDTH, name, first)
        for line in others:
            log.info("%-*s %s", _NAME_WIDTH, "", line)
    for line in format_param_groups(param_groups):
        log.info("param group %s", line)
    return setup


class _Formatter(logging.Formatter):
    """Formatter that prefixes warnings and errors with their level."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        is_severe = record.levelno >= logging.WARNING
        return f"{record.levelname.lower()}: {text}" if is_severe else text


def enable_logging() -> None:
    """Print the ``onecycle`` logger's messages of level INFO and above.

    This function does not replace a handler or a level that the user has configured.
    """
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        log.addHandler(handler)
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


def _describe_schedule(scheduler: LRScheduler | None, config_name: str) -> str:
    if isinstance(scheduler, ScheduleBinder):
        schedule = scheduler.schedule
        names = " and ".join(schedule.hyperparameters)
        if isinstance(schedule, PerGroup):
            kinds = " and ".join(part.type_name for part in schedule.parts)
            return f"{names} set per param group by {kinds} from {config_name}"
        return f"{type(schedule).__name__} from {config_name} sets {names}"
    return "none" if scheduler is None else f"{type(scheduler).__name__} passed as `lr_scheduler`"


def _describe_checkpoints(config: Config) -> str:
    plan = config.checkpoint
    if plan.dir is None:
        return "not saved automatically (`engine.checkpoint.dir` is not set)"
    if plan.every is None:
        return f"only after a signal, in {plan.dir} (`engine.checkpoint.every` is not set)"
    every = plan.every.strip() if isinstance(plan.every, str) else f"{plan.every:,.0f} steps"
    return f"every {every}, in {plan.dir}"

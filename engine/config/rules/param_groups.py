"""Rules for the param groups of the optimizer.

They report schedules that do not fit the groups, and ``no_decay`` keys that have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.config.param_groups import find_group_schedulers, read_hyperparameters
from engine.config.rules.context import Rule, RuleContext
from engine.config.schedule_context import build_base_values
from engine.config.schema import (
    OPTIMIZERS,
    add_optimizer_defaults,
    is_import_path,
    optimizer_name,
)
from engine.errors import Problem

__all__ = ["RULES"]

_HYPERPARAMETERS = {"momentum": {"momentum", "betas"}, "weight_decay": {"weight_decay"}}


def _read_entries(context: RuleContext) -> list[Mapping[str, Any]]:
    """Return the entries of ``optimizer.param_groups``.

    Return [] if any value in the ``optimizer`` section is invalid or "auto".
    """
    pointer = "/optimizer"
    if any(each.startswith(pointer) for each in context.unresolved):
        return []
    return list(context.get_section("optimizer").get("param_groups", ()))


def _check_own_schedules(context: RuleContext) -> Iterator[Problem]:
    """Yield an error for each param group that cannot use its own schedule."""
    entries = _read_entries(context)
    if not entries or not context.is_run_resolved:
        return
    name = optimizer_name(context.get_section("optimizer")["type"])
    assert name is not None
    # The hyperparameters of a custom optimizer are unknown before the schedule is bound.
    known = None if is_import_path(name) else OPTIMIZERS[name]["properties"].keys()
    for index, pointer, block in find_group_schedulers(context.config):
        schedule = context.group_schedules.get(index)
        if schedule is None:
            continue
        shared = context.schedule
        if shared is not None and shared.feedback is not None:
            message = f"{shared.type_name} sets the values of all param groups, so no group can "
            message += "have its own schedule."
            hint = "Remove the group's `scheduler`, or remove the `scheduler` section."
            yield context.error("param-groups", pointer, message, hint)
            continue
        if schedule.feedback is not None:
            message = f"{schedule.type_name} depends on the {schedule.feedback}, which the "
            message += "schedule of a single param group does not receive."
            hint = "Move the schedule to the `scheduler` section."
            yield context.error("param-groups", pointer, message, hint)
            continue
        missing = [
            each
            for each in schedule.hyperparameters
            if known is not None and each in _HYPERPARAMETERS and not _HYPERPARAMETERS[each] & known
        ]
        if missing:
            message = f"{schedule.type_name} changes {missing[0]}, but {name} has none."
            hint = "Choose another schedule or optimizer."
            if missing[0] == "momentum" and hasattr(schedule, "cycle_momentum"):
                hint = (
                    'Set "cycle_momentum": false in the params of the schedule, or choose another '
                    "optimizer."
                )
            yield context.error("param-groups", pointer, message, hint)
            continue
        base = build_base_values(context.config, schedule, read_hyperparameters(entries[index]))
        if error := context.find_schedule_error(schedule, base, block):
            yield context.error("schedule", f"{pointer}/params", error)


def _check_shared_schedule(context: RuleContext) -> Iterator[Problem]:
    """Yield an error if the ``scheduler`` section would replace the groups' own learning rates.

    Ignore groups that have their own schedule. Also ignore the group of parameters that match no
    entry of ``param_groups``, because it may be empty.
    """
    schedule, block = context.schedule, context.get_section("optimizer")
    uses_groups = bool(block.get("param_groups")) or block.get("layer_decay", 1) != 1
    if schedule is None or schedule.lists_per_group or not uses_groups:
        return
    if not context.is_run_resolved or context.find_incompatibility():
        return
    own = [
        read_hyperparameters(entry) for entry in _read_entries(context) if "scheduler" not in entry
    ]
    rows = [build_base_values(context.config, schedule, group) for group in own or [{}]]
    base = {name: tuple(row[name][0] for row in rows) for name in rows[0]}
    decay = block.get("layer_decay", 1)
    if decay != 1:
        base = {name: values * 2 for name, values in base.items()}
        base["lr"] = (*base["lr"][: len(rows)], *(lr * decay for lr in base["lr"][len(rows) :]))
    if error := context.find_schedule_error(schedule, base, context.config.get("scheduler")):
        yield context.error("schedule", "/scheduler/params", error)


def _check_no_decay(context: RuleContext) -> Iterator[Problem]:
    """Yield a problem if ``no_decay`` has no effect."""
    block = context.get_section("optimizer")
    entries = _read_entries(context)
    name = optimizer_name(block.get("type", ""))
    if name is None or is_import_path(name):
        return
    if not (block.get("no_decay") or any("no_decay" in e for e in entries)):
        return
    pointer, properties = "/optimizer/no_decay", OPTIMIZERS[name]["properties"]
    if "weight_decay" not in properties:
        message = f"`no_decay` has no effect, because {name} has no weight decay."
        yield context.error("param-groups", pointer, message, "Remove the key.")
        return
    if any(each.startswith("/optimizer/params/weight_decay") for each in context.unresolved):
        return
    params = add_optimizer_defaults(name, block.get("params", {}), context.backend.name)
    default = params["weight_decay"]
    is_driven = context.schedule is not None and "weight_decay" in context.schedule.hyperparameters
    if not is_driven and not default and not any(each.get("weight_decay") for each in entries):
        message = "`no_decay` has no effect, because the weight decay is 0."
        hint = 'Set "weight_decay" in optimizer.params, or remove `no_decay`.'
        yield context.note("no-effect", pointer, message, hint)


RULES: tuple[Rule, ...] = (_check_own_schedules, _check_shared_schedule, _check_no_decay)

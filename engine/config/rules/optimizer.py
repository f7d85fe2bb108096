"""The optimizer: what it lacks for the schedule, and what is lost on it."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Rule, RuleContext
from engine.config.schema import OPTIMIZERS, optimizer_name
from engine.errors import Problem

__all__ = ["RULES"]


def _momentum(context: RuleContext) -> Iterator[Problem]:
    name = optimizer_name(context.section("optimizer").get("type", ""))
    if name is None or context.schedule is None:
        return
    parameters = OPTIMIZERS[name]["properties"]
    if "momentum" in context.schedule.drives and not {"momentum", "betas"} & parameters.keys():
        kind = context.section("scheduler")["type"]
        message = f"{kind} must drive momentum or betas, but {name} has neither."
        hint = 'Set "cycle_momentum": false in scheduler.params, or choose another optimizer.'
        yield context.error("no-momentum", "/scheduler", message, hint)


def _adam_w_mode(context: RuleContext) -> Iterator[Problem]:
    block = context.section("optimizer")
    mode = block.get("params", {}).get("adam_w_mode")
    if mode is not None and str(block.get("type")).lower() == "adamw":
        message = "`adam_w_mode` says nothing about AdamW, which decouples its weight decay anyway."
        place = "/optimizer/params/adam_w_mode"
        if mode:
            yield context.note("inert-key", place, message, "Remove it.")
        else:
            cure = 'Write "type": "Adam" for a weight decay that is added to the gradient.'
            yield context.error("inert-key", place, message, cure)


RULES: tuple[Rule, ...] = (_momentum, _adam_w_mode)

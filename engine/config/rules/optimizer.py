"""Rules for the optimizer.

They report schedules that change the momentum of an optimizer without momentum, and parameters that
have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Rule, RuleContext
from engine.config.schema import OPTIMIZERS, optimizer_name
from engine.errors import Problem

__all__ = ["RULES"]


def _check_momentum(context: RuleContext) -> Iterator[Problem]:
    name = optimizer_name(context.get_section("optimizer").get("type", ""))
    if name is None or context.schedule is None:
        return
    parameters = OPTIMIZERS[name]["properties"]
    if (
        "momentum" in context.schedule.hyperparameters
        and not {"momentum", "betas"} & parameters.keys()
    ):
        kind = context.get_section("scheduler")["type"]
        message = f"{kind} changes momentum or betas, but {name} has neither."
        hint = 'Set "cycle_momentum": false in scheduler.params, or choose another optimizer.'
        yield context.error("no-momentum", "/scheduler", message, hint)


def _check_adam_w_mode(context: RuleContext) -> Iterator[Problem]:
    block = context.get_section("optimizer")
    mode = block.get("params", {}).get("adam_w_mode")
    if mode is not None and str(block.get("type")).lower() == "adamw":
        message = "`adam_w_mode` has no effect on AdamW, which always uses decoupled weight decay."
        pointer = "/optimizer/params/adam_w_mode"
        if mode:
            yield context.note("no-effect", pointer, message, "Remove it.")
        else:
            hint = 'Use "type": "Adam" to add the weight decay to the gradient.'
            yield context.error("no-effect", pointer, message, hint)


RULES: tuple[Rule, ...] = (_check_momentum, _check_adam_w_mode)

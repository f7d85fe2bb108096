"""The optimizer: what it lacks for the schedule, and what is lost on it."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Checked, Rule
from engine.config.schema import OPTIMIZERS, optimizer_name
from engine.errors import Problem
from schedules import from_config

__all__ = ["RULES"]


def _momentum(checked: Checked) -> Iterator[Problem]:
    block = checked.section("scheduler")
    name = optimizer_name(checked.section("optimizer").get("type", ""))
    if name is None or "type" not in block:
        return
    try:
        drives = from_config({"type": block["type"], "params": block.get("params", {})}).drives
    except ValueError:
        return  # said already, or left to be filled in
    parameters = OPTIMIZERS[name]["properties"]
    if "momentum" in drives and not {"momentum", "betas"} & parameters.keys():
        message = f"{block['type']} must drive momentum or betas, but {name} has neither."
        hint = 'Set "cycle_momentum": false in scheduler.params, or choose another optimizer.'
        yield checked.error("no-momentum", "/scheduler", message, hint)


def _adam_w_mode(checked: Checked) -> Iterator[Problem]:
    block = checked.section("optimizer")
    mode = block.get("params", {}).get("adam_w_mode")
    if mode is not None and str(block.get("type")).lower() == "adamw":
        message = "`adam_w_mode` says nothing about AdamW, which decouples its weight decay anyway."
        place = "/optimizer/params/adam_w_mode"
        if mode:
            yield checked.note("inert-key", place, message, "Remove it.")
        else:
            cure = 'Write "type": "Adam" for a weight decay that is added to the gradient.'
            yield checked.error("inert-key", place, message, cure)


RULES: tuple[Rule, ...] = (_momentum, _adam_w_mode)

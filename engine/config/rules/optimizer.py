"""Rules for the optimizer.

They report optimizer params that are invalid or have no effect, schedules for a hyperparameter
that the optimizer lacks, and optimizers that do not support sharding.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.master_weights import find_cpu_adam_key
from engine.config.optimizer_types import TORCH_ARGUMENTS
from engine.config.rules.context import Rule, RuleContext
from engine.config.schema import OPTIMIZERS, is_import_path, optimizer_name
from engine.config.wording import quote_value
from engine.errors import Problem

__all__ = ["RULES"]

_NOT_SHARDED = {"Adafactor", "Rprop"}


def _check_hyperparameters(context: RuleContext) -> Iterator[Problem]:
    name = optimizer_name(context.get_section("optimizer").get("type", ""))
    if name is None or is_import_path(name) or context.schedule is None:
        return  # the schedule is checked against a custom optimizer when it is bound
    parameters = OPTIMIZERS[name]["properties"]
    if (
        "momentum" in context.schedule.hyperparameters
        and not {"momentum", "betas"} & parameters.keys()
    ):
        kind = context.get_section("scheduler")["type"]
        message = f"{kind} changes momentum or betas, but {name} has neither."
        hint = "Choose another schedule or optimizer."
        if hasattr(context.schedule, "cycle_momentum"):
            hint = 'Set "cycle_momentum": false in scheduler.params, or choose another optimizer.'
        yield context.error("no-momentum", "/scheduler", message, hint)
    if "weight_decay" in context.schedule.hyperparameters and "weight_decay" not in parameters:
        kind = context.get_section("scheduler")["type"]
        message = f"{kind} changes the weight decay, but {name} has none."
        hint = "Choose another schedule or optimizer."
        yield context.error("schedule", "/scheduler", message, hint)


def _check_adam_w_mode(context: RuleContext) -> Iterator[Problem]:
    block = context.get_section("optimizer")
    mode = block.get("params", {}).get("adam_w_mode")
    if mode is not None and str(block.get("type")).lower() == "adamw":
        message = "`adam_w_mode` has no effect on AdamW, which always uses decoupled weight decay."
        pointer = "/optimizer/params/adam_w_mode"
        if mode:
            yield context.note("no-effect", pointer, message, "Remove the key.")
        else:
            hint = 'Use "type": "Adam" to add the weight decay to the gradient.'
            yield context.error("no-effect", pointer, message, hint)


def _check_nesterov(context: RuleContext) -> Iterator[Problem]:
    params = context.get_section("optimizer").get("params", {})
    pointer = "/optimizer/params"
    if params.get("nesterov") is not True or f"{pointer}/momentum" in context.unresolved:
        return
    if not params.get("momentum"):
        message = "`nesterov` requires a `momentum` above 0."
        hint = 'Add "momentum": 0.9, or remove `nesterov`.'
        yield context.error("optimizer-params", f"{pointer}/nesterov", message, hint)
    elif params.get("dampening"):
        message = f"`dampening` must be 0 if `nesterov` is true, got {params['dampening']:g}."
        hint = "Remove one of the two keys."
        yield context.error("optimizer-params", f"{pointer}/dampening", message, hint)


def _check_implementation(context: RuleContext) -> Iterator[Problem]:
    """Yield an error for arguments of PyTorch's optimizers that the implementation rejects."""
    params = context.get_section("optimizer").get("params", {})
    given = [key for key in TORCH_ARGUMENTS if params.get(key)]
    if not given:
        return
    pointer = "/optimizer/params/fused"
    deepspeed_key = find_cpu_adam_key(context.config) or (
        "torch_adam" if params.get("torch_adam") is False else None
    )
    if context.backend.name == "deepspeed" and deepspeed_key:
        message = (
            f"`{given[0]}` requires PyTorch's implementation of the optimizer, but "
            f"`{deepspeed_key}` selects DeepSpeed's."
        )
        hint = f"Remove `{given[0]}`."
        yield context.error("optimizer-params", f"/optimizer/params/{given[0]}", message, hint)
    elif params.get("fused") and params.get("foreach"):
        message = "`fused` and `foreach` must not both be true."
        yield context.error("optimizer-params", pointer, message, "Remove one of the two keys.")
    elif params.get("fused") and params.get("dampening"):
        message = "PyTorch's fused SGD computes wrong first steps with `dampening`."
        hint = "Remove `fused`."
        yield context.error("optimizer-params", pointer, message, hint)


def _check_etas(context: RuleContext) -> Iterator[Problem]:
    etas = context.get_section("optimizer").get("params", {}).get("etas")
    if any(each.startswith("/optimizer/params/etas") for each in context.unresolved):
        return
    if etas is not None and not 0 < etas[0] < 1 < etas[1]:
        message = (
            "`etas` must be two factors, the first between 0 and 1 and the second above 1, got "
            f"{quote_value(etas)}."
        )
        hint = "The default is [0.5, 1.2]."
        yield context.error("optimizer-params", "/optimizer/params/etas", message, hint)


def _check_sharding(context: RuleContext) -> Iterator[Problem]:
    """Yield an error for ZeRO with a PyTorch optimizer that does not support sharded parameters.

    If the world size is unknown, yield a warning instead, because with a single rank, nothing is
    sharded.
    """
    name = optimizer_name(context.get_section("optimizer").get("type", ""))
    is_sharded = context.backend.name == "torch" and context.stage and context.world_size != 1
    if name in _NOT_SHARDED and is_sharded:
        stage = context.stage
        message = f"PyTorch's {name} does not support sharded parameters (ZeRO stage {stage})."
        hint = 'Set "zero_optimization": {"stage": 0}, or choose a different optimizer.'
        report = context.warning if context.world_size is None else context.error
        yield report("not-sharded", "/optimizer/type", message, hint)


RULES: tuple[Rule, ...] = (
    _check_hyperparameters,
    _check_adam_w_mode,
    _check_nesterov,
    _check_implementation,
    _check_etas,
    _check_sharding,
)

"""Rules for mixed precision.

They report keys that conflict with each other or with the ZeRO stage. They also report a loss scale
that has no minimum.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.backend_choice import find_offload_device
from engine.config.master_weights import find_bf16_name, find_cpu_adam_key
from engine.config.rules.context import Rule, RuleContext
from engine.config.schema import optimizer_name
from engine.config.wording import quote_value
from engine.errors import Problem

__all__ = ["RULES"]

_NAMES = ("fp16", "bf16", "bfloat16", "torch_autocast")
_BFLOAT16 = {"bf16", "bfloat16", "torch.bfloat16"}
_FLOAT16 = {"fp16", "float16", "half", "torch.float16"}
_FLOAT32 = {"fp32", "float32", "float", "torch.float32"}
_OPTIMIZER = "/optimizer"
_OFFLOAD = "/zero_optimization/offload_optimizer"
_OR_STATES = ', or "bf16_optimizer_states": true to the same section as this key'


def _check_single_precision(context: RuleContext) -> Iterator[Problem]:
    has_both = "bf16" in context.config and "bfloat16" in context.config
    names = [name for name in _NAMES if not (has_both and name == "bfloat16")]
    on = [name for name in names if context.is_enabled(name)]
    if len(on) > 1 and not _is_autocast_of_16_bits(context, on):
        both = " and ".join(f"`{name}.enabled`" for name in on)
        message = f"Only one precision can be enabled, but {both} are true."
        yield context.error(
            "precision", f"/{on[0]}/enabled", message, "Set all but one of these keys to false."
        )
    if has_both:
        message = "The config has both `bf16` and its deprecated name `bfloat16`."
        yield context.error("precision", "/bfloat16", message, "Remove the `bfloat16` section.")


def _is_autocast_of_16_bits(context: RuleContext, on: list[str]) -> bool:
    """Return whether only ``torch_autocast`` and the section for its 16-bit dtype are enabled.

    ``on`` contains the names of the enabled sections. For ``fp16`` without ZeRO, return False,
    because DeepSpeed would scale the loss twice.
    """
    if len(on) != 2 or "torch_autocast" not in on:
        return False
    dtype = context.get_section("torch_autocast").get("dtype", "")
    dtypes = _FLOAT16 if "fp16" in on else _BFLOAT16
    return dtype in dtypes and (bool(context.stage) or "fp16" not in on)


def _check_cpu_adam(context: RuleContext) -> Iterator[Problem]:
    key = find_cpu_adam_key(context.config)
    if key is None or not context.stage:
        return
    pointer = f"/{key.replace('.', '/')}"
    block = context.get_section("optimizer")
    name = optimizer_name(block.get("type", "")) if block else "Adam"
    is_known = not any(each.startswith((_OPTIMIZER, _OFFLOAD)) for each in context.unresolved)
    if is_known and find_offload_device(context.config, "offload_optimizer") == "none":
        message = f"`{key}` requires the optimizer to be offloaded to the CPU."
        hint = f'Add "offload_optimizer": {{"device": "cpu"}} to `zero_optimization`{_OR_STATES}.'
        if not key.startswith("bf"):
            hint = 'Add "offload_optimizer": {"device": "cpu"} to `zero_optimization`.'
        yield context.error("precision", pointer, message, hint)
    elif is_known and (name not in {"Adam", "AdamW"} or block.get("params", {}).get("torch_adam")):
        kind = "torch's Adam" if name in {"Adam", "AdamW"} else name
        message = f"`{key}` requires DeepSpeed's CPU Adam, but the optimizer is {kind}."
        hint = f'Set "type": "AdamW" and "torch_adam": false, or remove `{key}`.'
        yield context.error("precision", pointer, message, hint)


def _check_master_weights(context: RuleContext) -> Iterator[Problem]:
    bf16_name = find_bf16_name(context.config)
    for name, key in (
        ("fp16", "fp16_master_weights_and_grads"),
        (bf16_name, "bf16_master_weights_and_grads"),
        (bf16_name, "bf16_optimizer_states"),
    ):
        if context.get_section(name).get(key) is True and context.stage == 0:
            message = f"`{name}.{key}` requires ZeRO stage 1, 2 or 3, but the stage is 0."
            hint = 'Set "zero_optimization": {"stage": 1}, or remove the key.'
            yield context.error("precision", f"/{name}/{key}", message, hint)
    bf16 = context.get_section(bf16_name)
    if bf16.get("bf16_optimizer_states") is True and not bf16.get("bf16_master_weights_and_grads"):
        message = f"`{bf16_name}.bf16_optimizer_states` requires `bf16_master_weights_and_grads`."
        hint = 'Add "bf16_master_weights_and_grads": true, or remove the key.'
        yield context.error("precision", f"/{bf16_name}/bf16_optimizer_states", message, hint)


def _check_accumulation_dtype(context: RuleContext) -> Iterator[Problem]:
    """Yield a warning if gradients may accumulate in 16 bits although the config requests float32.

    Without master weights, the PyTorch backend accumulates each gradient in the dtype of its
    parameter, which is unknown before the run.
    """
    dtype = context.get_section("data_types").get("grad_accum_dtype")
    keeps_16_bits = context.get_section("engine").get("master_weights") is False
    if dtype in _FLOAT32 and keeps_16_bits and context.backend.name == "torch":
        message = (
            f"`data_types.grad_accum_dtype` is {quote_value(dtype)}, but the PyTorch backend "
            "accumulates the gradients of 16-bit parameters in 16 bits if `engine.master_weights` "
            "is false."
        )
        hint = "Remove `engine.master_weights` to keep parameters and gradients in float32."
        yield context.warning("precision", "/data_types/grad_accum_dtype", message, hint)


def _check_min_loss_scale(context: RuleContext) -> Iterator[Problem]:
    if context.get_section("fp16").get("min_loss_scale") == 0:
        message = "`fp16.min_loss_scale` is 0, so the loss scale has no minimum."
        hint = "Set the key to 1. The run then ends if gradients overflow at a loss scale of 1."
        if context.backend.name == "deepspeed":
            message = "`fp16.min_loss_scale` is 0, which DeepSpeed rejects. The run uses 1."
            hint = "Set the key to 1."
        yield context.note("no-minimum-loss-scale", "/fp16/min_loss_scale", message, hint)


RULES: tuple[Rule, ...] = (
    _check_single_precision,
    _check_master_weights,
    _check_min_loss_scale,
    _check_cpu_adam,
    _check_accumulation_dtype,
)

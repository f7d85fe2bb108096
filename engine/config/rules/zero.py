"""Rules for ZeRO.

They report missing keys, conflicting settings and keys that have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.backend_choice import find_offload_device
from engine.config.rules.context import Rule, RuleContext
from engine.config.schema import optimizer_name
from engine.errors import Problem

__all__ = ["RULES"]

_ZERO = "/zero_optimization"
_TESTED_OPTIMIZERS = {"Adam", "AdamW", "Adagrad", "Lion", "Muon"}
_SAVES_16_BIT = "stage3_gather_16bit_weights_on_model_save"


def _check_stage(context: RuleContext) -> Iterator[Problem]:
    zero = context.config.get("zero_optimization")
    if isinstance(zero, bool):
        value = str(zero).lower()
        message = f"Setting `zero_optimization` to {value} is deprecated."
        hint = f'Use {{"stage": {context.stage}}} instead.'
        yield context.note("deprecated-key", _ZERO, message, hint)
    elif "zero_optimization" in context.config and context.is_absent(f"{_ZERO}/stage"):
        message = "`zero_optimization.stage` must be set. The default, 0, disables ZeRO."
        yield context.error("zero-without-stage", _ZERO, message, 'Set "stage" to 1, 2 or 3.')


def _check_offload(context: RuleContext) -> Iterator[Problem]:
    zero = context.get_section("zero_optimization")
    if context.stage is None or "stage" not in zero:
        return
    for name, least, what in (
        ("offload_optimizer", 1, "optimizer states"),
        ("offload_param", 3, "parameters"),
    ):
        block = zero.get(name) or {}
        device = find_offload_device(context.config, name)
        if device not in {"none", "auto"} and context.stage < least:
            stages = "1, 2 or 3" if least == 1 else "3"
            message = (
                f"`{name}`, which offloads the {what}, requires ZeRO stage {stages}, but the "
                f"stage is {context.stage}."
            )
            hint = f"Remove `{name}`, or set the stage to {stages}."
            yield context.error("offload-without-stage", f"{_ZERO}/{name}", message, hint)
        elif block.get("ratio", 1) != 1 and context.stage != 3:
            message = (
                f"`{name}.ratio` must be 1 in ZeRO stages below 3, got {block['ratio']:g} in stage "
                f"{context.stage}."
            )
            pointer = f"{_ZERO}/{name}/ratio"
            yield context.error("offload-without-stage", pointer, message, "Remove the key.")


def _check_single_process_offload(context: RuleContext) -> Iterator[Problem]:
    """Yield a warning if the PyTorch backend ignores CPU offloading in a single-process run."""
    if context.world_size != 1 or context.backend.name != "torch":
        return
    for name in ("offload_optimizer", "offload_param"):
        if find_offload_device(context.config, name) == "cpu":
            message = f"`{name}` has no effect with a single process on the PyTorch backend."
            hint = 'Use several ranks, or set `engine.backend` to "deepspeed".'
            yield context.warning("offload-single-process", f"{_ZERO}/{name}", message, hint)


def _check_nvme(context: RuleContext) -> Iterator[Problem]:
    zero = context.get_section("zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        block = zero.get(name) or {}
        pointer = f"{_ZERO}/{name}"
        path = block.get("nvme_path")
        on_deepspeed = context.backend.name == "deepspeed"  # PyTorch rejects the device itself
        if (
            on_deepspeed
            and block.get("device") == "nvme"
            and context.is_absent(f"{pointer}/nvme_path")
        ):
            message = f'`{name}.nvme_path` must be set if the device is "nvme".'
            hint = 'Set "nvme_path" to a directory on the NVMe drive, such as "/local_nvme".'
            yield context.error("nvme-without-path", pointer, message, hint)
        if path and block.get("device", "none") != "nvme" and on_deepspeed:
            message = f'`{name}.nvme_path` has an effect only if the device is "nvme".'
            hint = 'Remove the key, or set "device": "nvme".'
            yield context.note("no-effect", f"{pointer}/nvme_path", message, hint)


def _check_gradient_reduction(context: RuleContext) -> Iterator[Problem]:
    if str(context.config.get("gradient_allreduce_op")).lower() != "sum":
        return
    zero = context.get_section("zero_optimization")
    for is_average_only, what in (
        (context.stage == 3, "ZeRO stage 3"),
        (zero.get("zenflow") is not None, "ZenFlow"),
        (context.get_section("compile").get("deepcompile") is True, "DeepCompile"),
    ):
        if is_average_only:
            message = f'`gradient_allreduce_op` must be "mean" with {what}, got "sum".'
            hint = "Remove the key."
            yield context.error("summed-gradients", "/gradient_allreduce_op", message, hint)


def _check_untested_optimizer(context: RuleContext) -> Iterator[Problem]:
    name = optimizer_name(context.get_section("optimizer").get("type", ""))
    on_deepspeed = context.backend.name == "deepspeed"
    if not context.stage or not on_deepspeed or name is None or name in _TESTED_OPTIMIZERS:
        return
    if context.is_absent("/zero_allow_untested_optimizer") or (
        context.config.get("zero_allow_untested_optimizer") is False
    ):
        message = (
            f"DeepSpeed has not tested ZeRO with {name}, and rejects this combination by default."
        )
        hint = 'Add "zero_allow_untested_optimizer": true, or set "engine": {"backend": "torch"}.'
        yield context.error("untested-optimizer", "/optimizer/type", message, hint)


def _check_elastic_checkpoint(context: RuleContext) -> Iterator[Problem]:
    block = context.get_section("optimizer")
    zero = context.get_section("zero_optimization")
    if zero.get("elastic_checkpoint") is not True or context.stage not in {1, 2}:
        return
    name = optimizer_name(block.get("type", "")) or ""
    is_adam = name in {"Adam", "AdamW"}
    device = find_offload_device(context.config, "offload_optimizer")
    fused = name == "Lion" or (is_adam and (block.get("params") or {}).get("torch_adam") is False)
    if not name or (fused and device == "none"):
        return
    message = (
        f"`elastic_checkpoint` must be false with this {name} optimizer, got true. DeepSpeed can "
        "load elastic checkpoints only with its fused Adam or Lion."
    )
    can_use_fused = is_adam and device == "none"
    alternative = (
        ', or set "torch_adam": false to use DeepSpeed\'s fused Adam' if can_use_fused else ""
    )
    pointer = f"{_ZERO}/elastic_checkpoint"
    yield context.error("elastic-checkpoint", pointer, message, f"Remove the key{alternative}.")


def _check_gradient_norm(context: RuleContext) -> Iterator[Problem]:
    zero = context.get_section("zero_optimization")
    if zero.get("compute_grad_norm") is not False or context.stage is None:
        return
    is_offloaded = find_offload_device(context.config, "offload_optimizer") != "none"
    clipping = context.config.get("gradient_clipping") or 0
    for is_invalid, what, hint in (
        (context.stage not in {1, 2}, f"ZeRO stage {context.stage}", "Remove the key."),
        (clipping > 0, "gradient clipping", 'Set "gradient_clipping" to 0, or remove the key.'),
        (is_offloaded, "`offload_optimizer`", "Remove one of the two keys."),
        (zero.get("zenflow") is not None, "`zenflow`", "Remove one of the two keys."),
    ):
        if is_invalid:
            message = f"`compute_grad_norm` must be true with {what}, got false."
            yield context.error("gradient-norm", f"{_ZERO}/compute_grad_norm", message, hint)


RULES: tuple[Rule, ...] = (
    _check_stage,
    _check_offload,
    _check_single_process_offload,
    _check_nvme,
    _check_gradient_reduction,
    _check_untested_optimizer,
    _check_elastic_checkpoint,
    _check_gradient_norm,
)

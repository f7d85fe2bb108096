"""ZeRO: what a stage can do, and what is lost on it."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules.context import Rule, RuleContext
from engine.config.schema import optimizer_name
from engine.errors import Problem

__all__ = ["RULES"]

_ZERO = "/zero_optimization"
_OF_ZERO = {"Adam", "AdamW", "Adagrad", "Lion", "Muon"}
_SAVES_16_BIT = "stage3_gather_16bit_weights_on_model_save"


def _stage_given(context: RuleContext) -> Iterator[Problem]:
    zero = context.config.get("zero_optimization")
    if isinstance(zero, bool):
        old = f"`zero_optimization` {str(zero).lower()}"
        message = f"{old} is an old spelling of stage {context.stage}."
        hint = f'Write {{"stage": {context.stage}}}.'
        yield context.note("deprecated-key", _ZERO, message, hint)
    elif "zero_optimization" in context.config and context.lacks(f"{_ZERO}/stage"):
        message = "`zero_optimization` must say its `stage`, but does not, and 0 is no ZeRO."
        yield context.error("zero-without-stage", _ZERO, message, 'Add "stage": 1, 2 or 3.')


def _offload(context: RuleContext) -> Iterator[Problem]:
    zero = context.section("zero_optimization")
    if context.stage is None or "stage" not in zero:
        return
    for name, least, what in (
        ("offload_optimizer", 1, "optimizer states"),
        ("offload_param", 3, "parameters"),
    ):
        block = zero.get(name) or {}
        device = block.get("device", "none")
        if device not in {"none", "auto"} and context.stage < least:
            message = (
                f"`{name}` must go with ZeRO stage {' or '.join(map(str, range(least, 4)))}, which "
                f"split the {what}, but the stage is {context.stage}."
            )
            hint = f"Remove `{name}`, or set the stage."
            yield context.error("offload-without-stage", f"{_ZERO}/{name}", message, hint)
        if block.get("ratio", 1) != 1 and context.stage != 3:
            message = (
                f"`{name}.ratio` must be 1 but in ZeRO stage 3, and the stage is {context.stage}."
            )
            place = f"{_ZERO}/{name}/ratio"
            yield context.error("offload-without-stage", place, message, "Remove it.")


def _offload_alone(context: RuleContext) -> Iterator[Problem]:
    """Yield what one process on PyTorch has no use of: it divides nothing."""
    if context.world_size != 1 or context.backend.name != "torch":
        return
    zero = context.section("zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "cpu":
            message = f"`{name}` is of no effect on one process, which on PyTorch divides nothing."
            hint = 'Start several ranks, or set "backend": "deepspeed", which offloads one\'s too.'
            yield context.warning("offload-alone", f"{_ZERO}/{name}", message, hint)


def _nvme(context: RuleContext) -> Iterator[Problem]:
    zero = context.section("zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        block = zero.get(name) or {}
        place = f"{_ZERO}/{name}"
        path = block.get("nvme_path")
        if block.get("device") == "nvme" and context.lacks(f"{place}/nvme_path"):
            message = f'`{name}.nvme_path` must be given for the device "nvme", but is missing.'
            yield context.error(
                "nvme-without-path", place, message, 'Add "nvme_path": "/local_nvme".'
            )
        if path and block.get("device", "none") != "nvme":
            message = f'`{name}.nvme_path` is read for the device "nvme" alone.'
            yield context.note("inert-key", f"{place}/nvme_path", message)


def _stage_3_keys(context: RuleContext) -> Iterator[Problem]:
    zero = context.section("zero_optimization")
    keys = [key for key in zero if key.startswith("stage3_")]
    if keys and context.stage is not None and context.stage < 3 and "stage" in zero:
        more = f", and {len(keys) - 1} more," if len(keys) > 1 else ""
        message = f"`{keys[0]}`{more} is of no effect in stage {context.stage}."
        yield context.note("inert-key", f"{_ZERO}/{keys[0]}", message)


def _summed_gradients(context: RuleContext) -> Iterator[Problem]:
    if str(context.config.get("gradient_allreduce_op")).lower() != "sum":
        return
    zero = context.section("zero_optimization")
    for refused, what in (
        (context.stage == 3, "ZeRO stage 3"),
        (zero.get("zenflow") is not None, "ZenFlow"),
        (context.section("compile").get("deepcompile") is True, "DeepCompile"),
    ):
        if refused:
            message = f'`gradient_allreduce_op` must be "mean" with {what}, but is "sum" instead.'
            yield context.error("summed-gradients", "/gradient_allreduce_op", message)


def _untested_optimizer(context: RuleContext) -> Iterator[Problem]:
    name = optimizer_name(context.section("optimizer").get("type", ""))
    of_deepspeed = context.backend.name == "deepspeed"
    if not context.stage or not of_deepspeed or name is None or name in _OF_ZERO:
        return
    if context.lacks("/zero_allow_untested_optimizer") or (
        context.config.get("zero_allow_untested_optimizer") is False
    ):
        message = (
            f"DeepSpeed's ZeRO must be told that {name}, which it has not tested, is meant, but is "
            "not: it would refuse it once all ranks are up."
        )
        hint = 'Add "zero_allow_untested_optimizer": true, or set "engine": {"backend": "torch"}.'
        yield context.error("untested-optimizer", "/optimizer/type", message, hint)


def _elastic_checkpoint(context: RuleContext) -> Iterator[Problem]:
    block = context.section("optimizer")
    zero = context.section("zero_optimization")
    if zero.get("elastic_checkpoint") is not True or context.stage not in {1, 2}:
        return
    name = optimizer_name(block.get("type", "")) or ""
    is_adam = name in {"Adam", "AdamW"}
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    fused = name == "Lion" or (is_adam and (block.get("params") or {}).get("torch_adam") is False)
    if not name or (fused and device == "none"):
        return
    message = (
        f"`elastic_checkpoint` must be false with {name} as it runs here, but is true instead: "
        "DeepSpeed could not load what it saved, since only its fused Adam and Lion keep the count "
        "of steps where that format looks."
    )
    cure = ', or have DeepSpeed build its own: "torch_adam": false' if is_adam else ""
    place = f"{_ZERO}/elastic_checkpoint"
    yield context.error("elastic-checkpoint", place, message, f"Remove it{cure}.")


RULES: tuple[Rule, ...] = (
    _stage_given,
    _offload,
    _offload_alone,
    _nvme,
    _stage_3_keys,
    _summed_gradients,
    _untested_optimizer,
    _elastic_checkpoint,
)

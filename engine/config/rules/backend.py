"""Rules for keys that the backend or its installed version does not support."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

from engine.config.backend_choice import find_deepspeed_only_keys
from engine.config.no_effect import find_reason_for_no_effect
from engine.config.pointers import dotted_name, get_last_key, is_within
from engine.config.rules.context import Rule, RuleContext
from engine.config.versions import get_installed_version
from engine.config.wording import quote_value
from engine.errors import Problem
from schedules.core.spelling import find_nearest

__all__ = ["RULES"]

_COMPILER_GROUP = "torch_dynamo_backends"


def _check_support(context: RuleContext) -> Iterator[Problem]:
    if context.backend.name == "deepspeed":
        yield from _find_torch_only(context)
        return
    for member in context.members:
        if get_last_key(member.pointer) == "device" and member.value == "nvme":
            name = dotted_name(member.pointer)
            message = f'`{name}` must be "none" or "cpu" on the PyTorch backend, got "nvme".'
            hint = 'Use "cpu", or set `engine.backend` to "deepspeed".'
            yield context.error("other-backend", member.pointer, message, hint)
    for member in find_deepspeed_only_keys(context.members):
        name = dotted_name(member.pointer)
        message = f'`{name}` is supported only by DeepSpeed, but `engine.backend` is "torch".'
        hint = 'Remove the key, or set `engine.backend` to "deepspeed".'
        yield context.error("other-backend", member.pointer, message, hint, at_key=True)


def _find_torch_only(context: RuleContext) -> Iterator[Problem]:
    """Yield an error for each key that the DeepSpeed backend does not support.

    Keys that have their default value or do not affect the results of the run are ignored.
    """
    for member in context.members:
        torch_only = member.schema.get("x-backend") == "torch"
        # The rollback of AutoWU copies the training state, but DeepSpeed does not support a copy.
        torch_only |= member.pointer == "/scheduler/params/rollback"
        torch_only &= find_reason_for_no_effect(member, "deepspeed") is None
        if torch_only and member.value not in (member.schema.get("default"), None):
            name = dotted_name(member.pointer)
            reason = context.backend.reason
            message = f"`{name}` is not supported by DeepSpeed, the backend of this run ({reason})."
            hint = (
                'Remove the key, or set `engine.backend` to "torch" and remove all keys that '
                "require DeepSpeed."
            )
            yield context.error("other-backend", member.pointer, message, hint, at_key=True)


def _check_installed_version(context: RuleContext) -> Iterator[Problem]:
    newer = [member for member in context.members if "x-since" in member.schema]
    version = get_installed_version("deepspeed") if newer else None
    if version is None:
        return
    for member in newer:
        since = member.schema["x-since"]
        if _parse_version(since) > _parse_version(version):
            name = dotted_name(member.pointer)
            message = f"`{name}` requires DeepSpeed {since} or newer, but {version} is installed."
            hint = "Upgrade DeepSpeed, or remove the key."
            yield context.warning("newer-key", member.pointer, message, hint)


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(
        int(part) for part in version.split("+", maxsplit=1)[0].split(".") if part.isdecimal()
    )


_BACKENDS = {"torch": "PyTorch", "deepspeed": "DeepSpeed"}


def _find_keys_without_effect(context: RuleContext) -> Iterator[Problem]:
    backend = context.backend.name
    has_stage = "stage" in context.get_section("zero_optimization")
    stage = context.stage if has_stage else None
    # On DeepSpeed, only the layer decay needs the blocks of the model.
    uses_layer_decay = context.get_section("optimizer").get("layer_decay", 1) != 1
    last = None
    for member in context.members:
        reason = find_reason_for_no_effect(member, backend, stage)
        is_inside = last is not None and is_within(member.pointer, [last])
        # A deprecated key has a note already, and a section with an invalid key has an error.
        has_problem = member.schema.get("deprecated") or (
            member.is_section
            and any(is_within(each, [member.pointer]) for each in context.unresolved)
        )
        has_use = member.pointer == "/engine/wrap" and uses_layer_decay
        if reason is None or is_inside or has_problem or has_use:
            continue
        last = member.pointer
        name = dotted_name(member.pointer)
        message = f"`{name}` has no effect on the {_BACKENDS[backend]} backend. {reason}"
        hint = "Remove the key, or keep it for another backend."
        yield context.note("no-effect", member.pointer, message, hint)


_COMPILERS = {
    "aot_eager",
    "aot_eager_decomp_partition",
    "aot_eager_decomp_partition_crossref",
    "aot_eager_decomp_partition_with_mode",
    "aot_eager_default_partitioner",
    "aot_ts",
    "cudagraphs",
    "eager",
    "eager_debug",
    "eager_noexcept",
    "inductor",
    "invoke_subgraph",
    "openxla",
    "openxla_eval",
    "pre_dispatch_eager",
    "ts",
    "tvm",
}
"""Names of the ``torch.compile`` backends that PyTorch itself registers."""


def _check_compiler(context: RuleContext) -> Iterator[Problem]:
    name = context.get_section("engine").get("compile")
    if name is None or name in _COMPILERS or entry_points(group=_COMPILER_GROUP, name=name):
        return
    near = find_nearest(name, _COMPILERS)
    message = (
        f"`engine.compile` is {quote_value(name)}, which is not one of PyTorch's built-in compiler "
        "backends."
    )
    hint = (
        f"Did you mean `{near}`?"
        if near
        else 'Use "inductor", or register the backend before calling `initialize`.'
    )
    yield context.warning("unknown-compiler", "/engine/compile", message, hint)


RULES: tuple[Rule, ...] = (
    _check_compiler,
    _check_support,
    _check_installed_version,
    _find_keys_without_effect,
)

"""Keys that the backend which the config names does not honour."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.backend_choice import find_deepspeed_only
from engine.config.pointers import dotted_name, key_at
from engine.config.rules.context import Rule, RuleContext
from engine.errors import Problem
from engine.versions import installed

__all__ = ["RULES"]


def _honoured(context: RuleContext) -> Iterator[Problem]:
    if context.backend.name == "deepspeed":
        yield from _of_torch_alone(context)
        return
    for member in context.members:
        if key_at(member.pointer) == "device" and member.value == "nvme":
            message = '"nvme" is offered by DeepSpeed alone, but `engine.backend` is torch.'
            hint = 'Write "cpu", or set "backend": "deepspeed".'
            yield context.error("other-backend", member.pointer, message, hint)
    for member in find_deepspeed_only(context.members):
        name = dotted_name(member.pointer)
        message = f"`{name}` is honoured by DeepSpeed alone, but `engine.backend` is torch."
        hint = 'Remove it, or set "backend": "deepspeed".'
        yield context.error("other-backend", member.pointer, message, hint, at_key=True)


def _of_torch_alone(context: RuleContext) -> Iterator[Problem]:
    """Yield the keys that PyTorch alone honours, where they ask for something."""
    for member in context.members:
        of_torch = member.schema.get("x-backend") == "torch"
        # AutoWU's: DeepSpeed's states are nobody else's to copy.
        of_torch |= member.pointer == "/scheduler/params/rollback"
        if of_torch and member.value not in (member.schema.get("default"), None):
            name = dotted_name(member.pointer)
            reason = context.backend.reason
            message = f"`{name}` is honoured on PyTorch alone, but DeepSpeed runs this: {reason}."
            hint = 'Remove it, or set "backend": "torch" and remove what is DeepSpeed\'s.'
            yield context.error("other-backend", member.pointer, message, hint, at_key=True)


def _known_to_the_installed(context: RuleContext) -> Iterator[Problem]:
    newer = [member for member in context.members if "x-since" in member.schema]
    there = installed("deepspeed") if newer else None
    if there is None:
        return
    for member in newer:
        since = member.schema["x-since"]
        if _numbers(since) > _numbers(there):
            name = dotted_name(member.pointer)
            message = f"`{name}` is known since DeepSpeed {since}, but {there} is installed."
            hint = "Install a newer one, or remove the key."
            yield context.warning("newer-key", member.pointer, message, hint)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(
        int(part) for part in version.split("+", maxsplit=1)[0].split(".") if part.isdecimal()
    )


def _tags(context: RuleContext) -> Iterator[Problem]:
    wanted = context.section("checkpoint").get("tag_validation", "fail")
    if str(wanted).lower() != "fail":
        message = (
            f"`tag_validation` is {wanted!r}, but ranks that give a checkpoint different tags are "
            "an error here with every value: no part of them would be a checkpoint."
        )
        yield context.note("inert-key", "/checkpoint/tag_validation", message)


RULES: tuple[Rule, ...] = (_honoured, _known_to_the_installed, _tags)

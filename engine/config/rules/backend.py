"""Keys that the backend which the config names does not honour."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.backend_choice import choose, of_deepspeed_alone
from engine.config.rules.context import Checked, Rule
from engine.errors import Problem
from engine.versions import installed

__all__ = ["RULES"]


def _honoured(checked: Checked) -> Iterator[Problem]:
    chosen = choose(checked.config, checked.members)
    if chosen.name == "deepspeed":
        yield from _of_torch_alone(checked, chosen.reason)
        return
    for member in checked.members:
        if member.pointer.endswith("/device") and member.value == "nvme":
            message = '"nvme" is offered by DeepSpeed alone, but `engine.backend` is torch.'
            hint = 'Write "cpu", or set "backend": "deepspeed".'
            yield checked.error("other-backend", member.pointer, message, hint)
    for member in of_deepspeed_alone(checked.members):
        name = member.pointer[1:].replace("/", ".")
        message = f"`{name}` is honoured by DeepSpeed alone, but `engine.backend` is torch."
        hint = 'Remove it, or set "backend": "deepspeed".'
        yield checked.error("other-backend", member.pointer, message, hint, at_key=True)


def _of_torch_alone(checked: Checked, reason: str) -> Iterator[Problem]:
    """Yield the keys that PyTorch alone honours, where they ask for something."""
    for member in checked.members:
        of_torch = member.schema.get("x-backend") == "torch"
        # AutoWU's: DeepSpeed's states are nobody else's to copy.
        of_torch |= member.pointer == "/scheduler/params/rollback"
        if of_torch and member.value not in (member.schema.get("default"), None):
            name = member.pointer[1:].replace("/", ".")
            message = f"`{name}` is honoured on PyTorch alone, but DeepSpeed runs this: {reason}."
            hint = 'Remove it, or set "backend": "torch" and remove what is DeepSpeed\'s.'
            yield checked.error("other-backend", member.pointer, message, hint, at_key=True)


def _known_to_the_installed(checked: Checked) -> Iterator[Problem]:
    newer = [member for member in checked.members if "x-since" in member.schema]
    there = installed("deepspeed") if newer else None
    if there is None:
        return
    for member in newer:
        since = member.schema["x-since"]
        if _numbers(since) > _numbers(there):
            name = member.pointer[1:].replace("/", ".")
            message = f"`{name}` is known since DeepSpeed {since}, but {there} is installed."
            hint = "Install a newer one, or remove the key."
            yield checked.warning("newer-key", member.pointer, message, hint)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(
        int(part) for part in version.split("+", maxsplit=1)[0].split(".") if part.isdecimal()
    )


def _tags(checked: Checked) -> Iterator[Problem]:
    wanted = checked.section("checkpoint").get("tag_validation", "fail")
    if str(wanted).lower() != "fail":
        message = (
            f"`tag_validation` is {wanted!r}, but ranks that give a checkpoint different tags are "
            "an error here with every value: no part of them would be a checkpoint."
        )
        yield checked.note("inert-key", "/checkpoint/tag_validation", message)


RULES: tuple[Rule, ...] = (_honoured, _known_to_the_installed, _tags)

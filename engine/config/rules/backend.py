"""Keys that the backend which the config names does not honour."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.backend import choose, of_deepspeed_alone
from engine.config.problems import Problem
from engine.config.rules.checked import Checked, Rule

__all__ = ["RULES"]


def _honoured(checked: Checked) -> Iterator[Problem]:
    if choose(checked.config, checked.members).name != "torch":
        return
    for member in of_deepspeed_alone(checked.members):
        name = member.pointer[1:].replace("/", ".")
        message = f"`{name}` is honoured by DeepSpeed alone, but `engine.backend` is torch."
        hint = 'Remove it, or set "backend": "deepspeed".'
        yield checked.error("other-backend", member.pointer, message, hint, at_key=True)


RULES: tuple[Rule, ...] = (_honoured,)

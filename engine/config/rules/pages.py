"""The page of each rule: a summary, the reason, an example config, and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import schemas

__all__ = ["RULEBOOK"]


@dataclass(frozen=True)
class RulePage:
    """The page that `onecycle explain` prints; ``wrong`` is a config that breaks only this rule."""

    summary: str
    why: str
    wrong: str
    cure: str


RULEBOOK: Mapping[str, RulePage] = {
    rule: RulePage(**page) for rule, page in schemas.read("rules.json").items()
}
"""The pages by rule ID, in alphabetical order."""

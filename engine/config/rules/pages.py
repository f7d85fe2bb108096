"""The page of every rule: what it finds, why that matters, a config that has it, and its cure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import schemas

__all__ = ["RULEBOOK", "RulePage"]


@dataclass(frozen=True)
class RulePage:
    """What `onecycle explain` prints of a rule; ``wrong`` is a config that breaks it alone."""

    summary: str
    why: str
    wrong: str
    cure: str


RULEBOOK: Mapping[str, RulePage] = {
    rule: RulePage(**page) for rule, page in schemas.read("rules.json").items()
}
"""Each rule's page, in alphabetical order."""

"""The documentation of each validation rule, which `onecycle explain` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import schemas

__all__ = ["RULEBOOK"]


@dataclass(frozen=True)
class RulePage:
    """The documentation of one rule.

    ``summary`` says what the rule checks, ``why`` gives the reason, and ``cure`` describes the fix.
    ``wrong`` is an example config that violates only this rule.
    """

    summary: str
    why: str
    wrong: str
    cure: str


RULEBOOK: Mapping[str, RulePage] = {
    rule: RulePage(**page) for rule, page in schemas.read("rules.json").items()
}
"""Maps rule IDs to the documentation of the rules, in alphabetical order."""

"""Documentation of the validation rules, for `onecycle explain` and SARIF reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import schemas

__all__ = ["RULEBOOK"]


@dataclass(frozen=True)
class RulePage:
    """The documentation of one rule.

    ``summary`` describes the problem that the rule reports, ``reason`` explains why the rule
    exists, and ``fix`` describes how to fix the problem. ``example`` is the JSON text of a config
    that violates only this rule, or an empty string.
    """

    summary: str
    reason: str
    example: str
    fix: str


RULEBOOK: Mapping[str, RulePage] = {
    rule: RulePage(**page) for rule, page in schemas.read("rules.json").items()
}
"""Documentation of each rule, by rule ID."""

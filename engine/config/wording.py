"""Format counts and values for messages."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["count_noun", "quote_value", "shorten"]

_WIDTH = 60


def count_noun(count: int, noun: str) -> str:
    """Format a count and a noun, in the plural if the count is not 1.

    >>> count_noun(1, "rank"), count_noun(8, "rank"), count_noun(2000, "batch")
    ('1 rank', '8 ranks', '2,000 batches')
    """
    if count == 1:
        return f"{count} {noun}"
    return f"{count:,} {noun}es" if noun.endswith("tch") else f"{count:,} {noun}s"


def quote_value(value: Any) -> str:
    """Format a value as JSON, truncated to fit into a message.

    >>> quote_value({"stage": None})
    '{"stage": null}'
    """
    return shorten(json.dumps(value, default=repr))


def shorten(text: str) -> str:
    """Truncate a string to at most 60 characters."""
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"

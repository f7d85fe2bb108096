"""Provide the JSON schemas of the config, its sections and the schedules.

The schemas in ``schedulers/`` are generated from the dataclasses of the package `schedules`. The
schema in ``editor/`` is also generated, and combines all other schemas. The remaining files are
written by hand. In addition to the keywords of JSON Schema, the schemas use:

- ``x-auto``: integrations, such as transformers, that replace the value "auto"
- ``x-backend``: the only backend that supports the key
- ``x-instead``: replacement for a deprecated or removed key
- ``x-since`` and ``x-removed``: DeepSpeed versions in which the key was added and removed
- ``x-alias-of``: another key that has the same meaning

``aliases.json`` maps the key names of other tools to config keys. ``rules.json`` contains the
documentation of each validation rule. ``no_effect.json`` lists the keys that a backend can ignore
without affecting the results, and the reason for each. An entry with ``values`` applies only to
those values of the key. An entry with ``stages`` applies only to those ZeRO stages.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

__all__ = ["EDITOR", "read"]

EDITOR = "editor/ds_config.draft-07.json"
"""Name of the generated draft-07 schema that covers a whole config."""

_DIRECTORY = Path(__file__).parent


@functools.cache
def read(name: str) -> dict[str, Any]:
    """Return the parsed contents of a JSON file in this directory.

    The result is cached, so do not modify it.

    >>> read("sections/bf16.json")["title"]
    'bf16'
    """
    schema: dict[str, Any] = json.loads((_DIRECTORY / name).read_text(encoding="utf-8"))
    return schema

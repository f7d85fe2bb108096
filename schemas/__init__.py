"""JSON schemas, as data: ``ds_config.schema.json``, a file a section, a file a schedule.

``schedulers/`` is generated from the dataclasses of the package `schedules` and ``editor/`` from
all others, which are written by hand. Beside JSON Schema's keywords they use ``x-auto`` (who fills
in "auto"), ``x-backend`` (the one backend that honours a key), ``x-instead`` (what to write in
place of a deprecated or removed key), ``x-removed`` and ``x-since`` (DeepSpeed's versions) and
``x-alias-of``. ``aliases.json`` has other tools' names of keys, ``rules.json`` each rule's page.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

__all__ = ["EDITOR", "read"]

EDITOR = "editor/ds_config.draft-07.json"
"""The whole as one draft-07 schema, generated from the others."""

_FOLDER = Path(__file__).parent


@functools.cache
def read(name: str) -> dict[str, Any]:
    """Return the schema in a file of this folder. It is shared: do not change it.

    >>> read("sections/bf16.json")["title"]
    'bf16'
    """
    schema: dict[str, Any] = json.loads((_FOLDER / name).read_text(encoding="utf-8"))
    return schema

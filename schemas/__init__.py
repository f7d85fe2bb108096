"""JSON schemas, as data: ``ds_config.schema.json``, a file a section, a file a schedule.

``schedulers/`` is generated from the dataclasses of the package `schedules`; all else is written
by hand.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

__all__ = ["read"]

_FOLDER = Path(__file__).parent


@functools.cache
def read(name: str) -> dict[str, Any]:
    """Return the schema in a file of this folder. It is shared: do not change it.

    >>> read("sections/bf16.json")["title"]
    'bf16'
    """
    schema: dict[str, Any] = json.loads((_FOLDER / name).read_text(encoding="utf-8"))
    return schema

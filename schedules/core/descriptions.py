"""Read the descriptions of a schedule's fields.

The description of a field is the docstring below it in the class body. The descriptions of built-in
schedules are stored in a generated file, `INDEX`. The descriptions of custom schedules are read
from their source code at run time.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["INDEX", "read_descriptions", "read_index", "read_source_descriptions"]

INDEX = Path(__file__).parent / "index.json"
"""JSON file that maps the type of each built-in schedule to a dict with the schedule's module and
field descriptions. ``tools/generate.py`` writes this file."""


@functools.cache
def read_index() -> Mapping[str, Mapping[str, Any]]:
    """Return the contents of the JSON file `INDEX`: a dict with one entry per built-in schedule."""
    index: dict[str, dict[str, Any]] = json.loads(INDEX.read_text(encoding="utf-8"))
    return index


def read_descriptions(schedule: type) -> dict[str, str]:
    """Return the descriptions of a schedule's fields, by field name.

    Fields without a docstring are omitted. If the source code of a custom schedule is not
    available, its own fields have empty descriptions.
    """
    return _collect_descriptions(schedule, read_index())


def read_source_descriptions(schedule: type) -> dict[str, str]:
    """Return a schedule's field descriptions from its source code, without using `INDEX`."""
    return _collect_descriptions(schedule, {})


def _collect_descriptions(schedule: type, index: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    descriptions: dict[str, str] = {}
    for cls in schedule.__mro__:
        known = index.get(vars(cls).get("type_name", ""))
        if known is not None and cls.__module__ == f"schedules.{known['family']}":
            descriptions = {**known["fields"], **descriptions}
            break
        if "__dataclass_fields__" in vars(cls):
            descriptions = {**_read_source(cls), **descriptions}
    fields = dataclasses.fields(schedule)
    stored = {
        each.name: each.metadata["description"] for each in fields if "description" in each.metadata
    }
    found = {**descriptions, **stored}
    return {each.name: found[each.name] for each in fields if each.name in found}


def _read_source(cls: type) -> dict[str, str]:
    """Read the descriptions of a class's own fields from its source code."""
    own = vars(cls).get("__annotations__", {})
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return dict.fromkeys(own, "")  # The class was defined at a prompt or created at run time.
    assert isinstance(body, ast.ClassDef)
    descriptions = dict.fromkeys(own, "")
    for statement, below in zip(body.body, [*body.body[1:], None], strict=True):
        match statement, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                descriptions[name] = " ".join(text.split())
            case ast.AnnAssign(target=ast.Name(id=name)), _:
                descriptions.pop(name, None)
    return descriptions

"""Edit the text of a config: apply automatic fixes, or set the scheduler block.

All other text is preserved, including comments, whitespace and the order of keys.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from json import JSONDecoder
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.parser import Document
from engine.config.pointers import get_parent, join_pointer
from engine.config.source import load_document
from engine.config.text_edits import replace_values, set_value
from engine.errors import Problem

__all__ = ["FixEdit", "apply_fixes", "find_fix_edits", "replace_scheduler", "write_scheduler"]


def apply_fixes(
    document: Document, problems: Sequence[Problem], accept: Callable[[Problem], bool]
) -> str:
    """Fix problems in a config, remove its trailing commas, and return the new text.

    A key is not renamed if the same section already contains a key with the new name.

    Args:
        document: config to fix.
        problems: problems in the config. Problems without an automatic fix are skipped.
        accept: function that receives a problem whose fix is unsafe, and returns whether to apply
            the fix. See `Fix`.
    """
    text = document.text
    edits = [(comma, comma + 1, "") for comma in document.trailing_commas]
    edits += [edit[1:] for edit in find_fix_edits(document, problems, accept)]
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


class FixEdit(NamedTuple):
    """The automatic fix for a problem: ``text`` replaces ``[start:end]`` of the config's text."""

    problem: Problem
    start: int
    end: int
    text: str


def find_fix_edits(
    document: Document,
    problems: Sequence[Problem],
    accept: Callable[[Problem], bool] = lambda problem: True,
) -> Iterator[FixEdit]:
    """Yield the edit for each problem whose automatic fix is safe or is accepted by ``accept``.

    The arguments are the same as those of `apply_fixes`.
    """
    text = document.text
    taken = set(document.locations)
    for problem in problems:
        location = document.locations.get(problem.pointer)
        if problem.fix is None or location is None:
            continue
        key = problem.fix.key
        renamed = join_pointer(get_parent(problem.pointer), key) if key else None
        if renamed in taken:
            continue
        start = document.get_offset(location.key if key else location.value)
        try:
            _, end = JSONDecoder().raw_decode(text, start)
        except ValueError:  # unquoted text
            continue
        if problem.fix.is_certain or accept(problem):
            taken |= {renamed} if renamed else set()
            yield FixEdit(problem, start, end, json.dumps(key or problem.fix.value))


def write_scheduler(path: Path, block: Mapping[str, Any]) -> Path:
    """Add or replace the scheduler block in a config file, and keep a backup of the original.

    Returns:
        Path of the backup: the config's path with ``.bak`` appended.

    Raises:
        ConfigError: if the config cannot be read.
        OSError: if the config or its backup cannot be written.
    """
    document = load_document(path)
    text = replace_scheduler(document, block)
    backup = path.with_name(f"{path.name}.bak")
    shutil.copy2(path, backup)
    path.write_bytes(document.encode_text(text))
    return backup


def replace_scheduler(document: Document, block: Mapping[str, Any]) -> str:
    """Return the text of a config with the scheduler block added or replaced.

    If the existing block has the same type and parameter names, only changed values are replaced,
    and comments inside the block are preserved.

    >>> from engine.config.parser import parse
    >>> text = '{"scheduler": {"type": "A", "params": {"x": 1}} // mine\\n}'
    >>> print(replace_scheduler(parse(text, "c.json"), {"type": "A", "params": {"x": 2}}))
    {"scheduler": {"type": "A", "params": {"x": 2}} // mine
    }
    """
    old = document.value.get("scheduler")
    if old is None:
        return set_value(document, "/scheduler", block)
    params = old.get("params", {})
    same = old.get("type") == block["type"] and params.keys() == block["params"].keys()
    if not same:
        return replace_values(document, {"/scheduler": block})
    changed = {
        f"/scheduler/params/{key}": value
        for key, value in block["params"].items()
        if params[key] != value
    }
    return replace_values(document, changed)

"""Edit the text of a config: apply automatic fixes, or set the scheduler block.

All other text is preserved, including comments, whitespace and the order of keys.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from json import JSONDecoder
from pathlib import Path
from typing import Any

from engine.config.parser import Document
from engine.config.pointers import get_parent, join_pointer
from engine.config.source import load_document
from engine.errors import Problem

__all__ = ["apply_fixes", "replace_scheduler", "write_scheduler"]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|#[^\n]*|/\*.*?\*/|[{}\[\],]', re.DOTALL)
_INDENT = 2


def apply_fixes(
    document: Document, problems: Sequence[Problem], accept: Callable[[Problem], bool]
) -> str:
    """Apply the automatic fixes of problems to the text of a config, and remove trailing commas.

    A key is not renamed if the config already contains a key with the new name.

    Args:
        document: config to fix.
        problems: problems in the config. Problems without an automatic fix are skipped.
        accept: function that returns whether to apply the fix of a problem if it is not certain.

    Returns:
        The fixed text, and the problems that were fixed.
    """
    text = document.text
    edits = [(comma, comma + 1, "") for comma in document.trailing_commas]
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
            edits.append((start, end, json.dumps(key or problem.fix.value)))
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def write_scheduler(path: Path, block: Mapping[str, Any]) -> Path:
    """Add or replace the scheduler block in a config file, and keep a backup of the original.

    Returns:
        Path of the backup: the config's path with ``.bak`` appended.

    Raises:
        ConfigError: the config cannot be read.
        OSError: the config or its backup cannot be written.
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
        return _insert_block(document, block)
    params = old.get("params", {})
    same = old.get("type") == block["type"] and params.keys() == block["params"].keys()
    if not same:
        return _replace_values(document, {"/scheduler": block})
    changed = {
        f"/scheduler/params/{key}": value
        for key, value in block["params"].items()
        if params[key] != value
    }
    return _replace_values(document, changed)


def _replace_values(document: Document, values: Mapping[str, Any]) -> str:
    text = document.text
    spans = [(*_find_span(document, pointer), value) for pointer, value in values.items()]
    for start, end, value in sorted(spans, key=lambda span: span[0], reverse=True):
        text = text[:start] + _format_json(value, _INDENT) + text[end:]
    return text


def _insert_block(document: Document, block: Mapping[str, Any]) -> str:
    """Return the text of a config with the scheduler block added after the last key."""
    text = document.text
    tokens = [token for token in _TOKEN.finditer(text) if not _is_comment(token.group())]
    close = tokens[-1].start()
    member = f'"scheduler": {_format_json(block, _INDENT)}'
    if not document.value:
        return f"{text[:close]}{member}{text[close:]}"
    members = (join_pointer("", key) for key in document.value)
    last = max(members, key=lambda at: _find_span(document, at)[1])
    end = _find_span(document, last)[1]
    comma = tokens[-2].start() if tokens[-2].group() == "," else None  # trailing comma
    at = end if comma is None else comma + 1
    return f"{text[:at]}{',' if comma is None else ''}\n{' ' * _INDENT}{member}{text[at:]}"


def _find_span(document: Document, pointer: str) -> tuple[int, int]:
    """Return the start and the end of the value at a JSON pointer, as offsets in the text."""
    text = document.text
    start = document.get_offset(document.locations[pointer].value)
    if text[start] not in "{[":
        plain = re.compile(r'"(?:[^"\\]|\\.)*"|[-+.\w]+').match(text, start)
        assert plain is not None
        return start, plain.end()
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += (token.group() in "{[") - (token.group() in "}]")
        if depth == 0:
            return start, token.end()
    raise AssertionError("unbalanced brackets in a config that was parsed without an error")


def _is_comment(token: str) -> bool:
    return token.startswith(("//", "#", "/*"))


def _format_json(value: Any, indent: int) -> str:
    return json.dumps(value, indent=_INDENT).replace("\n", "\n" + " " * indent)

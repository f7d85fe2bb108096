"""Apply fixes to the text of a config, and insert a scheduler block.

The rest of the text does not change, including comments, the order of keys and whitespace.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from json import JSONDecoder
from pathlib import Path
from typing import Any

from engine.config.parser import Document
from engine.config.pointers import parent_of, pointer_to
from engine.config.source import load_document
from engine.errors import Problem

__all__ = ["put_scheduler", "repair", "with_scheduler"]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|#[^\n]*|/\*.*?\*/|[{}\[\],]', re.DOTALL)
_INDENT = 2


def repair(document: Document, problems: Sequence[Problem]) -> tuple[str, list[Problem]]:
    """Apply every automatic fix; return the new text and the problems that it solves.

    The rest of the text does not change, including comments and whitespace. A key is not renamed
    if the config already has a key with the new name.
    """
    text = document.text
    edits: list[tuple[int, int, str]] = []
    fixed = []
    taken = set(document.places)
    for problem in problems:
        place = document.places.get(problem.pointer)
        if problem.fix is None or place is None:
            continue
        start = document.offset(place.key if problem.fix.key else place.value)
        if problem.fix.key:
            new = pointer_to(parent_of(problem.pointer), problem.fix.key)
            if new in taken:
                continue
            taken.add(new)
        if not text.startswith('"', start):
            continue
        _, end = JSONDecoder().raw_decode(text, start)
        edits.append((start, end, json.dumps(problem.fix.key or problem.fix.value)))
        fixed.append(problem)
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text, fixed


def put_scheduler(path: Path, block: Mapping[str, Any]) -> Path:
    """Write a scheduler block into a config file; return the path of a backup of the old file.

    Raises:
        OSError: the config or the backup cannot be written.
    """
    document = load_document(path)
    text = with_scheduler(document, block)
    backup = path.with_name(f"{path.name}.bak")
    shutil.copy2(path, backup)
    path.write_bytes(document.encoded(text))
    return backup


def with_scheduler(document: Document, block: Mapping[str, Any]) -> str:
    """Return the text of a config with a new scheduler block.

    If the old block has the same type and the same parameters, only the values that differ are
    replaced. Comments inside the block then remain.

    >>> from engine.config.parser import parse
    >>> text = '{"scheduler": {"type": "A", "params": {"x": 1}} // mine\\n}'
    >>> print(with_scheduler(parse(text, "c.json"), {"type": "A", "params": {"x": 2}}))
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
    """Insert the block before the closing brace of the config."""
    text = document.text
    tokens = [token for token in _TOKEN.finditer(text) if not _is_comment(token.group())]
    close = tokens[-1].start()
    member = f'"scheduler": {_format_json(block, _INDENT)}'
    if not document.value:
        return f"{text[:close]}{member}{text[close:]}"
    members = (pointer_to("", key) for key in document.value)
    last = max(members, key=lambda at: _find_span(document, at)[1])
    end = _find_span(document, last)[1]
    comma = tokens[-2].start() if tokens[-2].group() == "," else None  # trailing comma
    at = end if comma is None else comma + 1
    return f"{text[:at]}{',' if comma is None else ''}\n{' ' * _INDENT}{member}{text[at:]}"


def _find_span(document: Document, pointer: str) -> tuple[int, int]:
    """Return the start and end index of a value in the text."""
    text = document.text
    start = document.offset(document.places[pointer].value)
    if text[start] not in "{[":
        plain = re.compile(r'"(?:[^"\\]|\\.)*"|[-+.\w]+').match(text, start)
        assert plain is not None
        return start, plain.end()
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += (token.group() in "{[") - (token.group() in "}]")
        if depth == 0:
            return start, token.end()
    raise AssertionError("a parsed config has balanced braces")


def _is_comment(token: str) -> bool:
    return token.startswith(("//", "#", "/*"))


def _format_json(value: Any, indent: int) -> str:
    return json.dumps(value, indent=_INDENT).replace("\n", "\n" + " " * indent)

"""Set or remove values in the text of a config without changing comments, whitespace or key order.

A new key is added at the end of its object and indented like its siblings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from engine.config.parser import Document
from engine.config.pointers import get_last_key, get_parent, join_pointer

__all__ = ["find_span", "remove_key", "replace_values", "set_value"]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|#[^\n]*|/\*.*?\*/|[{}\[\],]', re.DOTALL)
_PLAIN = re.compile(r'"(?:[^"\\]|\\.)*"|[-+.\w]+')
_REST_OF_LINE = re.compile(r"[ \t]*(?://[^\n]*|#[^\n]*|/\*(?:[^*\n]|\*(?!/))*\*/)?[ \t]*(?=\n|$)")
_INDENT = 2


def set_value(document: Document, pointer: str, value: Any) -> str:
    """Return the text of a config with the value at a JSON pointer replaced or added.

    Missing parent objects are added.

    Args:
        document: config whose syntax is valid.
        pointer: JSON pointer of the value, which must not be an item of an array.
        value: JSON value.

    Raises:
        ValueError: the parent of the value is not an object.

    >>> from engine.config.parser import parse
    >>> print(set_value(parse('{"a": {"b": 1} /* mine */}', "c.json"), "/a/c", 2))
    {"a": {"b": 1, "c": 2} /* mine */}
    """
    if pointer in document.locations:
        return replace_values(document, {pointer: value})
    parent, key = get_parent(pointer), get_last_key(pointer)
    if parent not in document.locations:
        return set_value(document, parent, {key: value})
    if not isinstance(document.get_value(parent), Mapping):
        message = (
            f"`{key}` cannot be set, because `{parent}` is not an object. Replace the value of "
            f"`{parent}` with an object."
        )
        raise ValueError(message)  # noqa: TRY004  # the type of a value in the config
    return _add_member(document, parent, key, value)


def remove_key(document: Document, pointer: str) -> str:
    """Return the text of a config without the key at a JSON pointer.

    >>> from engine.config.parser import parse
    >>> remove_key(parse('{"a": 1, "b": 2}', "c.json"), "/b")
    '{"a": 1}'
    """
    text = document.text
    start = document.get_offset(document.locations[pointer].key)
    end = find_span(document, pointer)[1]
    comma = next(_find_tokens(text, end))
    if comma.group() == ",":
        is_adjacent = not text[end : comma.start()].strip()
        cuts = [(start, comma.end())] if is_adjacent else [(start, end), comma.span()]
        cuts[0] = _widen_to_line(text, *cuts[0])
    else:
        cuts = [(start, end)]
        siblings = [each for each in _list_members(document, get_parent(pointer)) if each < start]
        comma = next(_find_tokens(text, max(siblings, default=start)))
        if comma.group() == ",":
            is_adjacent = not text[comma.end() : start].strip()
            cuts = [(comma.start(), end)] if is_adjacent else [comma.span(), (start, end)]
    for first, last in sorted(cuts, reverse=True):
        text = text[:first] + text[last:]
    return text


def _widen_to_line(text: str, start: int, end: int) -> tuple[int, int]:
    """Extend a span to its whole line if the line has no other text.

    Otherwise, extend the span over the spaces that follow it.
    """
    line_start = text.rfind("\n", 0, start) + 1
    if not text[line_start:start].strip() and text[end : end + 1] == "\n":
        return line_start, end + 1
    return start, end + len(text[end:]) - len(text[end:].lstrip(" "))


def replace_values(document: Document, values: Mapping[str, Any]) -> str:
    """Return the text of a config with the values at the given JSON pointers replaced."""
    text = document.text
    spans = [(*find_span(document, pointer), value) for pointer, value in values.items()]
    for start, end, value in sorted(spans, key=lambda span: span[0], reverse=True):
        text = text[:start] + _format_json(value, _read_indent(text, start)) + text[end:]
    return text


def find_span(document: Document, pointer: str) -> tuple[int, int]:
    """Return the start and the end of the value at a JSON pointer, as offsets in the text."""
    text = document.text
    start = document.get_offset(document.locations[pointer].value)
    if text[start] not in "{[":
        plain = _PLAIN.match(text, start)
        if plain is None:
            raise ValueError(f"The value of `{pointer}` is not valid JSON. Correct the value.")
        return start, plain.end()
    depth = 0
    for token in _find_tokens(text, start):
        depth += (token.group() in "{[") - (token.group() in "}]")
        if depth == 0:
            return start, token.end()
    raise AssertionError("unbalanced brackets in a config that was parsed without an error")


def _add_member(document: Document, parent: str, key: str, value: Any) -> str:
    text = document.text
    start, end = find_span(document, parent)
    ends = _list_members(document, parent)
    if not ends:
        member = f"{json.dumps(key)}: {_format_json(value, _read_indent(text, start))}"
        return f"{text[: start + 1]}{member}{text[start + 1 :]}"
    at = max(ends)
    after = next(_find_tokens(text, at))
    has_comma = after.group() == ","
    first = text[start : document.get_offset(document.locations[_first(document, parent)].key)]
    is_multiline = "\n" in first
    indent = _read_indent(text, at) if is_multiline else _read_indent(text, start) + _INDENT
    member = f"{json.dumps(key)}: {_format_json(value, indent)}"
    if not is_multiline and not isinstance(value, Mapping):
        at = after.end() if has_comma else at
        return f"{text[:at]}{'' if has_comma else ','} {member}{text[at:]}"
    separator = f"\n{' ' * indent}"
    if has_comma:
        at = after.end()
    else:
        text, at = f"{text[:at]},{text[at:]}", at + 1
        end += 1
    # A comment on the line of the last key belongs to that key.
    rest = _REST_OF_LINE.match(text, at)
    at = rest.end() if rest is not None and rest.end() < end else at
    return f"{text[:at].rstrip(' ')}{separator}{member}{text[at:]}"


def _list_members(document: Document, parent: str) -> list[int]:
    """Return the end offset of each member of an object."""
    keys = document.get_value(parent)
    return [find_span(document, join_pointer(parent, key))[1] for key in keys]


def _first(document: Document, parent: str) -> str:
    return join_pointer(parent, next(iter(document.get_value(parent))))


def _find_tokens(text: str, start: int) -> Iterator[re.Match[str]]:
    """Yield each string, bracket and comma outside comments, starting at an offset."""
    for token in _TOKEN.finditer(text, start):
        if not token.group().startswith(("//", "#", "/*")):
            yield token


def _read_indent(text: str, at: int) -> int:
    """Return the number of spaces at the start of the line that contains an offset."""
    line = text[text.rfind("\n", 0, at) + 1 :]
    return len(line) - len(line.lstrip(" "))


def _format_json(value: Any, indent: int) -> str:
    return json.dumps(value, indent=_INDENT).replace("\n", "\n" + " " * indent)

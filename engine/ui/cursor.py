"""Find the key or value at the cursor, even in text that is not yet valid JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Cursor", "Frame", "from_utf16", "locate", "to_utf16"]

_TOKEN = re.compile(
    r"""
    (?P<comment>//[^\n]*|\#[^\n]*|/\*(?:.*?\*/|.*))
    | (?P<string>"(?:[^"\\\n]|\\.)*"?)
    | (?P<mark>[{}\[\]:,])
    | (?P<word>[^\s{}\[\]:,"]+)
    """,
    re.VERBOSE | re.DOTALL,
)


def to_utf16(text: str, offset: int) -> int:
    """Convert a Python string index to an offset in UTF-16 code units, as used in JavaScript.

    >>> to_utf16("😀b", 1)
    2
    """
    return offset if text.isascii() else len(text[:offset].encode("utf-16-le")) // 2


def from_utf16(text: str, offset: int) -> int:
    """Convert an offset in UTF-16 code units, as used in JavaScript, to a Python string index.

    >>> from_utf16("😀b", 2)
    1
    """
    if text.isascii():
        return offset
    return len(text.encode("utf-16-le")[: 2 * offset].decode("utf-16-le", errors="ignore"))


@dataclass
class Frame:
    """A JSON object or array that contains the cursor."""

    is_object: bool
    expects: str
    """Kind of the next token: "key", "colon", "value" or "comma"."""
    key: str = ""
    """Key of the object's current member, or index of the array's current item."""
    keys: list[str] = field(default_factory=list)
    type: str | None = None
    """Value of the object's key ``type``; None until it is read."""


@dataclass(frozen=True)
class Cursor:
    """The token at the cursor, or the position at which a new token can be inserted.

    Args:
        role: "key" or "value"; "" if neither is valid at the cursor.
        frames: objects and arrays around the token, outermost first.
        start: offset of the start of the token.
        end: offset of the end of the token; equal to ``start`` if there is no token.
        text: the token, such as ``"lr"`` with its quotes.
        key: name of the key, without quotes; for a value, its key or index.
        path: keys and indices that lead to the innermost of ``frames``.
    """

    role: str
    frames: Sequence[Frame]
    start: int
    end: int
    text: str
    key: str
    path: tuple[str, ...]


def locate(text: str, offset: int) -> Cursor:
    """Return the cursor for the token that contains an offset or ends at it.

    The whole text is read, because ``type`` can come after ``params`` and determines which params
    are valid.
    """
    stack = [Frame(is_object=False, expects="value", key="")]
    found: Cursor | None = None
    for token in _TOKEN.finditer(text):
        if found is None and token.start() < offset <= token.end() and token["mark"] is None:
            inside = token["string"] is not None or token["word"] is not None
            found = _build(stack, *token.span(), token.group() if inside else None)
        elif found is None and token.start() >= offset:
            found = _build(stack, offset, offset, "")
        _advance(stack, token)
    return found or _build(stack, offset, offset, "")


def _build(stack: Sequence[Frame], start: int, end: int, text: str | None) -> Cursor:
    """Build the `Cursor` for a token; ``text`` is None in a comment and "" between tokens."""
    frames = tuple(stack[1:])
    # The path starts at the top of the config, which is not the value of a key.
    path = tuple(frame.key for frame in frames[:-1])
    if text is None or not frames:
        return Cursor("", frames, start, end, text or "", "", path)
    inner = frames[-1]
    # A string after a value is a key whose comma is still missing.
    starts_key = inner.expects == "key" or (inner.expects == "comma" and text.startswith('"'))
    if inner.is_object and starts_key:
        return Cursor("key", frames, start, end, text, _unquote(text), path)
    role = "value" if inner.expects == "value" else ""
    return Cursor(role, frames, start, end, text, inner.key, path)


def _advance(stack: list[Frame], token: re.Match[str]) -> None:
    """Update the stack of frames after a token has been read."""
    frame, text = stack[-1], token.group()
    if token["comment"] is not None:
        return
    if text in {"{", "["}:
        is_object = text == "{"
        stack.append(Frame(is_object, "key" if is_object else "value", "" if is_object else "0"))
    elif text in {"}", "]"}:
        if len(stack) > 1:
            stack.pop()
        stack[-1].expects = "comma"
    elif text == ",":
        frame.expects = "key" if frame.is_object else "value"
        if not frame.is_object:
            frame.key = str(int(frame.key or 0) + 1)
    elif text == ":":
        frame.expects = "value"
    elif frame.is_object and frame.expects in {"key", "comma"}:
        frame.key = _unquote(text)
        frame.keys.append(frame.key)
        frame.expects = "colon"
    else:
        if frame.key == "type" and token["string"] is not None:
            frame.type = _unquote(text)
        frame.expects = "comma"


def _unquote(token: str) -> str:
    try:
        value = json.loads(token)
    except ValueError:
        return token.strip('"')
    return value if isinstance(value, str) else token

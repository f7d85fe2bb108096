"""Parse the text of a config into values, and record the position of every key and value.

Like DeepSpeed's hjson parser, the parser accepts comments and trailing commas. Unlike DeepSpeed,
the parser rejects NaN and unquoted text. If possible, the parser continues after an error, so that
all problems are reported at once.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from json import JSONDecoder
from typing import Any, NoReturn

from engine.config.other_formats import recognize_text
from engine.config.pointers import get_parent, join_pointer, split_pointer
from engine.errors import Fix, Problem

__all__ = ["Document", "is_finite", "parse"]

MAX_DEPTH = 100
_BYTE_ORDER_MARK = "\ufeff"
_SPACE = re.compile(r"(?:\s|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
_COMMENT = re.compile(r"//|#|/\*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?(?![\w.+-])")
_WORD = re.compile(r"[^\s,:{}\[\]\"]+")
_PYTHONS = {"True": "true", "False": "false", "None": "null"}
_STRINGS = JSONDecoder()
_QUOTE = "'"
_LITERALS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Location:
    """The positions of a key and its value. A position is a 1-based (line, column) pair."""

    key: tuple[int, int]
    value: tuple[int, int]


@dataclass(frozen=True)
class Document:
    """A parsed config.

    ``locations`` maps the JSON pointer of each value to its `Location`. ``problems`` lists the
    problems that the parser found, for example duplicate keys.
    """

    name: str
    value: Any
    locations: Mapping[str, Location] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    text: str = ""
    has_byte_order_mark: bool = False
    """Whether the file starts with a byte order mark."""
    trailing_commas: tuple[int, ...] = ()
    """Offsets in ``text`` of the commas after the last item of an object or array."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Command-line arguments that set values, keyed by the JSON pointers of these values."""

    def encode_text(self, text: str) -> bytes:
        """Encode text as UTF-8, with a byte order mark if the original file has one."""
        return (_BYTE_ORDER_MARK + text if self.has_byte_order_mark else text).encode()

    @property
    def lines(self) -> list[str]:
        """The lines of the config, without line endings."""
        return [line.removesuffix("\r") for line in self.text.split("\n")]

    def get_offset(self, location: tuple[int, int]) -> int:
        """Convert a 1-based (line, column) position to an index into ``text``."""
        line, column = location
        return self._line_starts[line - 1] + column - 1

    @functools.cached_property
    def _line_starts(self) -> list[int]:
        return [0, *itertools.accumulate(len(line) + 1 for line in self.text.split("\n"))]

    def get_value(self, pointer: str) -> Any:
        """Return the value at a JSON pointer."""
        value = self.value
        for key in split_pointer(pointer):
            value = value[int(key)] if isinstance(value, list) else value[key]
        return value

    def build_problem(
        self,
        rule: str,
        pointer: str,
        message: str,
        hint: str = "",
        *,
        at_key: bool = False,
        severity: str = "error",
        fix: Fix | None = None,
        suggestion: str = "",
    ) -> Problem:
        """Build a `Problem`, and look up its line and column in the config.

        If ``pointer`` is not in the config, use the position of the nearest enclosing section.

        Args:
            rule: ID of the rule that found the problem.
            pointer: JSON pointer of the key.
            message: description of the problem.
            hint: how to fix the problem.
            at_key: whether to report the key's position instead of the value's.
            severity: "error", "warning" or "note".
            fix: automatic fix, or None.
            suggestion: key that the user probably meant, or the JSON pointer of a missing key.
        """
        around = pointer
        while around and around not in self.locations and around not in self.arguments:
            around = get_parent(around)
        location = self.locations.get(around)
        if around in self.arguments:
            location, message = None, f"{message} The value was set by {self.arguments[around]}."
        line, column = (0, 0) if location is None else location.key if at_key else location.value
        return Problem(
            rule=rule,
            severity=severity,
            pointer=pointer,
            line=line,
            column=column,
            message=message,
            hint=hint,
            fix=fix,
            suggestion=suggestion,
        )


def is_finite(number: float) -> bool:
    """Return whether a number is finite and fits in a 64-bit float.

    >>> is_finite(10**300), is_finite(10**400), is_finite(float("nan"))
    (True, False, False)
    """
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def parse(text: str, name: str) -> Document:
    """Parse the text of a config into a `Document`.

    If a syntax error prevents parsing, the returned document's ``value`` is None, and the
    document's ``problems`` contain the error.

    Args:
        text: text of the config.
        name: file name to use in messages.
    """
    has_byte_order_mark = text.startswith(_BYTE_ORDER_MARK)
    text = text.removeprefix(_BYTE_ORDER_MARK)
    parser = _Parser(text)
    value = None
    try:
        value = parser.document()
    except _BrokenSyntaxError as error:
        line, column = parser.find_location(error.at)
        problem = Problem("syntax", "error", "", line, column, error.message, error.hint)
        parser.problems.append(problem)
    return Document(
        name,
        value,
        parser.locations,
        tuple(parser.problems),
        text,
        has_byte_order_mark,
        tuple(parser.trailing_commas),
    )


@functools.cache
def _compile_unquoted_pattern() -> re.Pattern[str]:
    """Compile the regular expression that matches unquoted or single-quoted text."""
    return re.compile(
        r"""
        '[^'\n]*'                                       # text in single quotes
        | [A-Za-z_$][\w.$/-]*(?=\s*[,:}\]\n]|\s*$)      # a single word
        | [A-Za-z_$/~.][^\n"{}\[\]]*?                   # the rest of the line, as in hjson
          (?=\s*,?\s*(?:\n|$|[}\]]))
        """,
        re.VERBOSE,
    )


class _BrokenSyntaxError(Exception):
    def __init__(self, at: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.at = at
        self.message = message
        self.hint = hint


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.locations: dict[str, Location] = {}
        self.problems: list[Problem] = []
        self.trailing_commas: list[int] = []
        self._line_starts = [0, *(match.end() for match in re.finditer(r"\n", text))]
        self._lenient = False

    def find_location(self, at: int) -> tuple[int, int]:
        line = bisect_right(self._line_starts, at)
        return line, at - self._line_starts[line - 1] + 1

    def document(self) -> Any:
        if other := recognize_text(self.text):
            raise _BrokenSyntaxError(0, *other)
        self._space()
        if self.at == len(self.text):
            raise _BrokenSyntaxError(
                self.at,
                "The config must be a JSON object, got an empty file.",
                'Add a JSON object, such as {"train_batch_size": 32}.',
            )
        value = self._value("", self.find_location(self.at), depth=0)
        self._space()
        if self.at < len(self.text):
            self._expected("the end of the file")
        return value

    def _value(self, pointer: str, key: tuple[int, int], depth: int) -> Any:
        location = self.find_location(self.at)
        self.locations[pointer] = Location(key, location)
        if depth > MAX_DEPTH:
            raise _BrokenSyntaxError(
                self.at,
                f"The config must not be nested more than {MAX_DEPTH} levels deep.",
                "Reduce the nesting.",
            )
        match self.text[self.at : self.at + 1]:
            case "{":
                return self._object(pointer, depth)
            case "[":
                return self._array(pointer, depth)
            case '"':
                return self._string()
            case _:
                return self._number_or_word(pointer, location)

    def _object(self, pointer: str, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        self.at += 1
        while not self._skip_closing_bracket("}", first=not members):
            key_location = self.find_location(self.at)
            key = self._key()
            below = join_pointer(pointer, key)
            if key in members:
                first = self.locations[below].key[0]
                self.problems.append(
                    Problem(
                        "duplicate-key",
                        "error",
                        below,
                        *key_location,
                        f"Duplicate key `{key}`. The key is already set on line {first}.",
                        "Remove one of the keys. JSON parsers disagree about which value to use.",
                    )
                )
            self._space()
            self._take(":")
            self._space()
            members[key] = self._value(below, key_location, depth + 1)
        return members

    def _array(self, pointer: str, depth: int) -> list[Any]:
        items: list[Any] = []
        self.at += 1
        while not self._skip_closing_bracket("]", first=not items):
            below = join_pointer(pointer, len(items))
            items.append(self._value(below, self.find_location(self.at), depth + 1))
        return items

    def _skip_closing_bracket(self, bracket: str, *, first: bool) -> bool:
        """Advance past the closing bracket, or past the comma before the next item.

        Args:
            bracket: closing bracket of the current object or array.
            first: whether no item has been read yet. In that case, no comma is expected.

        Returns:
            Whether the closing bracket was found.
        """
        end = self.at
        self._space()
        if not first and not self.text.startswith(bracket, self.at):
            comma = self.at
            if not self.text.startswith(",", comma) and "\n" in self.text[end:comma]:
                self._report_not_strict(end, "Line breaks instead of commas", "Add commas.")
                return False
            self._take(",", f'"," or "{bracket}"')
            self._space()
            if self.text.startswith(bracket, self.at):
                self.trailing_commas.append(comma)
                self._report_not_strict(comma, "Trailing commas", "Remove them.")
        if not self.text.startswith(bracket, self.at):
            return False
        self.at += 1
        return True

    def _key(self) -> str:
        if self.text.startswith('"', self.at):
            return self._string()
        bare = _compile_unquoted_pattern().match(self.text, self.at)
        if bare is None:
            self._expected('"}" or a key in double quotes')
        self._report_unquoted("", bare[0])
        self.at = bare.end()
        return bare[0].strip("'")

    def _report_unquoted(self, pointer: str, shown: str) -> None:
        value = _PYTHONS.get(shown)
        if value:
            message = f"`{shown}` is Python syntax, not JSON."
            hint = f"Write {value}."
        else:
            message = f"`{shown[:40]}` must be in double quotes."
            hint = f'Write "{shown[:40].strip(_QUOTE)}".'
        location = self.find_location(self.at)
        self.problems.append(Problem("unquoted", "error", pointer, *location, message, hint))

    def _string(self) -> str:
        start = self.at
        try:
            string: str
            string, self.at = _STRINGS.raw_decode(self.text, start)
        except ValueError as error:
            raise _BrokenSyntaxError(start, f"Invalid string: {error}.") from None
        try:
            string.encode()
        except UnicodeEncodeError:
            message = "The string must be valid Unicode, but it contains an unpaired surrogate."
            location = self.find_location(start)
            self.problems.append(Problem("invalid-character", "error", "", *location, message))
            string = string.encode(errors="replace").decode()
        return string

    def _number_or_word(self, pointer: str, location: tuple[int, int]) -> Any:
        if number := _NUMBER.match(self.text, self.at):
            self.at = number.end()
            whole = number[1] is None and number[2] is None
            if len(number[0]) <= 400:
                value = int(number[0]) if whole else float(number[0])
                if is_finite(value):
                    return value
            shown = number[0] if len(number[0]) < 40 else number[0][:36] + "…"
            self._report_not_finite(pointer, location, shown)
            return None
        word = _WORD.match(self.text, self.at)
        if word is None:
            self._expected("a value")
        if word[0] in _LITERALS:
            self.at = word.end()
            return _LITERALS[word[0]]
        if word[0].lstrip("+-").lower() in {"nan", "inf", "infinity"}:
            self.at = word.end()
            self._report_not_finite(pointer, location, word[0])
            return None
        if bare := _compile_unquoted_pattern().match(self.text, self.at):
            self._report_unquoted(pointer, bare[0])
            self.at = bare.end()
            return bare[0].strip(_QUOTE) if bare[0] not in _PYTHONS else None
        return self._expected("a value")

    def _report_not_finite(self, pointer: str, location: tuple[int, int], shown: str) -> None:
        message = f"`{pointer}` must be a finite number, got {shown}."
        self.problems.append(Problem("not-finite", "error", pointer, *location, message))

    def _space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        comment = _COMMENT.search(match[0])
        if comment:
            hint = 'Write each comment as the value of a key that starts with "//".'
            self._report_not_strict(self.at + comment.start(), "Comments", hint)
        self.at = match.end()

    def _report_not_strict(self, at: int, what: str, hint: str) -> None:
        if not self._lenient:
            self._lenient = True
            message = f"{what} are not valid JSON. DeepSpeed accepts them; Accelerate does not."
            self.problems.append(
                Problem("not-strict-json", "note", "", *self.find_location(at), message, hint)
            )

    def _take(self, character: str, wanted: str = "") -> None:
        if not self.text.startswith(character, self.at):
            self._expected(wanted or f'"{character}"')
        self.at += 1

    def _expected(self, wanted: str) -> NoReturn:
        found = _WORD.match(self.text, self.at)
        shown = found[0][:40] if found else self.text[self.at : self.at + 1]
        instead = f'"{shown}"' if shown else "the end of the file"
        hint = "Use double quotes for strings." if shown[:1] == "'" else ""
        raise _BrokenSyntaxError(self.at, f"Expected {wanted}, got {instead}.", hint)

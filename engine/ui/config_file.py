"""Read a config file, save it with a backup, and detect changes by other programs."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from engine.config.source import check_is_readable

__all__ = ["ConfigFile", "FileChangedError", "Snapshot"]

_MAX_BYTES = 1_000_000
_LINE_END = re.compile(r"\r\n|\r|\n")
_BYTE_ORDER_MARK = "\ufeff"


class Snapshot(NamedTuple):
    """The text and the hash of a config file.

    Line endings in ``text`` are converted to ``\\n``. ``version`` is the hash, or an empty string
    if the file does not exist.
    """

    text: str
    version: str


class FileChangedError(ValueError):
    """Raised if another program has changed the file since it was read."""


class ConfigFile:
    """A config file that the user edits on the config page.

    The editor uses the line ending ``\\n`` and no byte order mark. `save` restores the original
    line endings and byte order mark, so that lines that the user has not edited do not change.

    Args:
        path: path of the file, which need not exist.
        template: text to show if the file does not exist.
    """

    def __init__(self, path: Path, template: str = "") -> None:
        self.path = path
        self._template = template

    def read(self) -> Snapshot:
        """Return the file's text and hash, or the template and an empty hash if there is no file.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is too large or is not UTF-8 text.
        """
        data = self._read_bytes()
        text = self._template if data is None else _decode(data, self.path)
        text = text.removeprefix(_BYTE_ORDER_MARK)
        return Snapshot(_LINE_END.sub("\n", text), _hash(data))

    def find_version(self) -> str:
        """Return the hash of the file, or an empty string if the file does not exist."""
        return _hash(self._read_bytes())

    def save(self, text: str, version: str) -> str:
        """Write the file, and keep the previous content in a backup file with the suffix ``.bak``.

        Args:
            text: text in the editor.
            version: expected hash of the file on disk; an empty string if no file should exist.

        Returns:
            The hash of the saved file.

        Raises:
            FileChangedError: the hash of the file on disk is not ``version``.
            OSError: the file cannot be written.
        """
        old = self._read_bytes()
        if _hash(old) != version:
            message = (
                f"{self.path.name} has been changed by another program. Reload or overwrite it."
            )
            raise FileChangedError(message)
        data = (text if old is None else _restore_line_ends(text, _decode(old, self.path))).encode()
        if data == old:
            return version
        target = self.path.resolve()  # A symbolic link stays a link.
        if old is not None:
            shutil.copy2(target, target.with_name(f"{target.name}.bak"))
        _write_atomically(target, data)
        return _hash(data)

    def _read_bytes(self) -> bytes | None:
        try:
            check_is_readable(self.path)
            with self.path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        if len(data) > _MAX_BYTES:
            raise ValueError(
                f"{self.path.name} is too large to edit on this page (limit: {_MAX_BYTES:,} "
                "bytes). Use a text editor instead."
            )
        return data


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        message = (
            f"{path.name} must be UTF-8 text, but the byte at offset {error.start} is invalid. "
            "Save the file as UTF-8."
        )
        raise ValueError(message) from None


def _hash(data: bytes | None) -> str:
    return "" if data is None else hashlib.sha256(data).hexdigest()


def _restore_line_ends(text: str, old: str) -> str:
    """Return ``text`` with the line endings and the byte order mark of ``old``."""
    mark = _BYTE_ORDER_MARK if old.startswith(_BYTE_ORDER_MARK) else ""
    ends = _LINE_END.findall(old)
    if set(ends) <= {"\n"}:
        return mark + text
    usual = Counter(ends).most_common(1)[0][0]
    before, after = _LINE_END.split(old.removeprefix(mark)), text.split("\n")
    new_ends = [usual] * len(after)
    for old_line, new_line in _match_lines(before, after):
        if old_line < len(ends):
            new_ends[new_line] = ends[old_line]
    pairs = zip(after, [*new_ends[:-1], ""], strict=True)
    return mark + "".join(f"{line}{end}" for line, end in pairs)


def _match_lines(before: Sequence[str], after: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield pairs ``(i, j)`` for which line ``after[j]`` equals or replaces ``before[i]``."""
    most = min(len(before), len(after))
    start = 0
    while start < most and before[start] == after[start]:
        start += 1
    end = 0
    while end < most - start and before[-1 - end] == after[-1 - end]:
        end += 1
    yield from ((index, index) for index in range(start))
    yield from ((len(before) - 1 - back, len(after) - 1 - back) for back in range(end))
    old, new = before[start : len(before) - end], after[start : len(after) - end]
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(
        None, old, new, autojunk=False
    ).get_opcodes():
        if tag == "equal" or i2 - i1 == j2 - j1:
            yield from ((start + i1 + index, start + j1 + index) for index in range(i2 - i1))


def _write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""Read a config from a file, standard input, a dict or a base64-encoded string."""

from __future__ import annotations

import base64
import difflib
import errno
import glob
import json
import math
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.config.other_formats import is_utf_16
from engine.config.parser import Document, is_finite, parse
from engine.config.pointers import join_pointer
from engine.errors import ConfigError, Problem

__all__ = ["Source", "check_is_readable", "find_unserializable", "load_document"]

# A config is usually a few kilobytes long. A much larger file is probably not a config.
_MAX_BYTES = 1_000_000
_MAX_FILES = 5  # number of file names in a message
_OPEN_FILES = {"/dev/fd", "/proc/self/fd"}

Source = str | os.PathLike[str] | Mapping[str, Any]


def load_document(config: Source) -> Document:
    """Read a config from a file, standard input ("-"), a dict, or a base64-encoded string.

    A path must name a regular file, because reading a named pipe or a device can block
    indefinitely. A pipe that the shell has opened, such as ``/dev/fd/63`` for ``<(command)``, is
    also accepted.

    Raises:
        ConfigError: the file does not exist, cannot be read, is too large, or is not UTF-8 text.
    """
    if isinstance(config, Mapping):
        return _load_mapping(config)
    if isinstance(config, str) and (decoded := _decode(config)) is not None:
        return parse(decoded, "config")
    path = Path(config)
    name = str(config)
    try:
        data = sys.stdin.buffer.read(_MAX_BYTES + 1) if name == "-" else _read(path)
        if len(data) > _MAX_BYTES:
            raise _build_unreadable_error(
                name,
                f"The config must not be larger than {_MAX_BYTES:,} bytes.",
                "Check that this is the right file.",
            )
        if is_utf_16(data):
            raise _build_unreadable_error(
                name, "The config must be UTF-8 text, but it is UTF-16.", "Save the file as UTF-8."
            )
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _build_unreadable_error(
            name,
            f"The config must be UTF-8 text, but the byte at offset {error.start} is invalid.",
            "Save the file as UTF-8.",
        ) from None
    except FileNotFoundError:
        raise _build_unreadable_error(name, *_describe_missing_file(path)) from None
    except OSError as error:
        raise _build_unreadable_error(
            name, f"The config cannot be read: {error.strerror}."
        ) from None
    return parse(text, name)


def check_is_readable(path: Path) -> None:
    """Check that a path is a regular file, or a pipe that is open in this process.

    Reading any other pipe or a device can block indefinitely.

    Raises:
        OSError: the path does not exist, or is another kind of file.
    """
    is_open = str(path) == "/dev/stdin" or str(path.parent) in _OPEN_FILES
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not (stat.S_ISREG(mode) or (is_open and not stat.S_ISBLK(mode))):
        reason = "not a regular file; use - to read standard input"
        raise OSError(errno.EINVAL, reason, str(path))


def _decode(text: str) -> str | None:
    """Decode a config from URL-safe base64, a format that DeepSpeed also accepts.

    Return None for any other string, such as a path.
    """
    try:
        decoded = base64.b64decode(text, altchars=b"-_", validate=True).decode("utf-8")
    except ValueError:
        return None
    is_object = decoded.lstrip().startswith("{")
    return decoded if is_object and len(decoded) <= _MAX_BYTES else None


def _read(path: Path) -> bytes:
    check_is_readable(path)
    with path.open("rb") as file:
        return file.read(_MAX_BYTES + 1)


def _load_mapping(config: Mapping[str, Any]) -> Document:
    if config.get("steps_per_print") == math.inf:
        # Accelerate disables DeepSpeed's messages with infinity, which JSON does not have.
        config = {**config, "steps_per_print": None}
    problems = tuple(find_unserializable(config, ""))
    value = config
    if not problems:
        # Copy the dict, so that the user can change it later without changing the config.
        value = json.loads(json.dumps(config, default=dict))
    return Document("config", value, problems=problems)


def find_unserializable(value: Any, pointer: str) -> Iterator[Problem]:
    """Yield a problem for each key or value that JSON cannot represent, such as NaN."""
    members: Any = ()
    if isinstance(value, Mapping):
        members = value.items()
    elif isinstance(value, list | tuple):
        members = enumerate(value)
    elif isinstance(value, int | float) and not is_finite(value):
        shown = value if isinstance(value, float) else "an integer that is too large for a float"
        message = f"`{pointer}` must be a finite number, got {shown}."
        yield Problem("not-finite", "error", pointer, 0, 0, message)
    elif not isinstance(value, str | int | float | bool | None):
        message = f"`{pointer}` must be a JSON value, got {value!r}."
        yield Problem("wrong-type", "error", pointer, 0, 0, message)
    for key, below in members:
        if isinstance(value, Mapping) and not isinstance(key, str):
            name = f"`{pointer}`" if pointer else "the config"
            message = f"Keys of {name} must be strings, got {key!r}."
            yield Problem("wrong-type", "error", pointer, 0, 0, message)
        yield from find_unserializable(below, join_pointer(pointer, key))


def _build_unreadable_error(name: str, message: str, hint: str = "") -> ConfigError:
    return ConfigError(name, [Problem("unreadable", "error", "", 0, 0, message, hint)])


def _describe_missing_file(path: Path) -> tuple[str, str]:
    """Return an error message and a hint for a path that does not lead to a file."""
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            message = f"{link} is a symbolic link to {link.resolve()}, which does not exist."
            return message, "Create the target of the link, or pass the path of another config."
    return "File not found.", _suggest_file(path)


def _suggest_file(path: Path) -> str:
    """Return a hint for the path of a missing config file, such as a similar path that exists."""
    directory = path.parent.absolute()
    if not directory.is_dir():
        existing = next((each for each in directory.parents if each.is_dir()), Path())
        for place in (Path(), existing):
            if (place / path.name).is_file():
                return f"Did you mean {place / path.name}?"
        return f"Check the path: there is no directory {directory}."
    files = sorted(other for other in directory.glob("*.json") if other.exists())
    stems = {other.stem: other.name for other in files}
    below = sorted(directory.glob(f"*/{glob.escape(path.name)}"))
    if path.stem not in stems and len(below) == 1:
        return f"Did you mean {path.parent / below[0].relative_to(directory)}?"
    if not stems:
        return f"Check the path: {directory} contains no JSON file."
    near = difflib.get_close_matches(path.stem, stems, n=1)
    if near or len(stems) == 1:
        return f"Did you mean {path.parent / stems[near[0] if near else min(stems)]}?"
    names = [*stems.values()]
    others = f" and {len(names) - _MAX_FILES} more" if len(names) > _MAX_FILES else ""
    return f"Check the path: {directory} contains {', '.join(names[:_MAX_FILES])}{others}."

"""Compute and verify the hashes of a checkpoint's files.

The hashes detect accidental damage, but not tampering: an attacker who can change a file can also
change the manifest that contains the hashes. New checkpoints use the hash function XXH3, which is
about ten times as fast as SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

__all__ = ["compute_hash", "describe_files", "find_hash", "matches_hash"]

_ALGORITHMS: Mapping[str, Callable[[], Any]] = {"xxh3_128": xxh3_128, "sha256": hashlib.sha256}
"""Hash functions, keyed by their names in a manifest. New checkpoints use the first one."""
_ALGORITHM = next(iter(_ALGORITHMS))
_CHUNK = 1 << 20  # bytes; stays in the cache of the core that hashes it


def compute_hash(path: Path, algorithm: str = _ALGORITHM) -> str:
    """Return the hash of a file as a hexadecimal string."""
    digest = _ALGORITHMS[algorithm]()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(view[:size])
    return str(digest.hexdigest())


def describe_files(paths: Iterable[Path], directory: Path) -> dict[str, dict[str, Any]]:
    """Return the size and hash of each file, keyed by its path relative to a directory."""
    return {
        path.relative_to(directory).as_posix(): {
            "size": path.stat().st_size,
            _ALGORITHM: compute_hash(path),
        }
        for path in paths
    }


def find_hash(entry: Mapping[str, Any]) -> str | None:
    """Return the key of the hash in a manifest entry, or None if the entry lacks a hash.

    >>> find_hash({"size": 1, "sha256": "ab"})
    'sha256'
    """
    return next((key for key in _ALGORITHMS if isinstance(entry.get(key), str)), None)


def matches_hash(path: Path, entry: Mapping[str, Any]) -> bool:
    """Return whether a file's hash matches its manifest entry."""
    algorithm = find_hash(entry)
    return algorithm is not None and compute_hash(path, algorithm) == entry[algorithm]

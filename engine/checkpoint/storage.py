"""A checkpoint as files: written beside, hashed, renamed, then pointed at.

::

    DIR/latest              the name of the newest one, for other tools; not relied on
    DIR/TAG/manifest.json   what is in it: files with sizes and hashes, versions, the run's identity
    DIR/TAG/…               the files
    DIR/.TAG.partial/       one that is being written, or whose writer died

A folder without a manifest is no checkpoint: the manifest is written last, and the folder gets its
name by one rename. Whatever moment a process dies at, the newest complete one is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

__all__ = [
    "Manifest",
    "begin",
    "checkpoints",
    "commit",
    "faults",
    "find",
    "is_begun",
    "prune",
    "read_manifest",
]

log = logging.getLogger("onecycle")

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 1
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    ``files`` has each file's size in bytes and SHA-256 by its path inside; ``identity`` what the
    run has to have in common with one that goes on from here; ``versions`` of what wrote it.
    """

    tag: str
    step: int
    world_size: int
    backend: str
    identity: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    resumable: bool = True
    """Whether a run that names no tag goes on from it."""
    frozen: bool = True
    """Whether it has the parameters that need no gradients."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry["size"] for entry in self.files.values())


def begin(folder: Path, tag: str) -> Path:
    """Return an empty folder to write a checkpoint into, beside its place.

    Raises:
        CheckpointError: the tag is no name of a folder.
        OSError: the folder cannot be written.
    """
    if not tag or tag in {".", "..", LATEST} or "/" in tag or os.sep in tag or tag.startswith("."):
        raise CheckpointError(
            f"`tag` must be a name for a folder that does not begin with a dot, but is {tag!r}."
        )
    partial = folder / f".{tag}.partial"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(20, "must be a folder for checkpoints, but is a file", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        shutil.rmtree(partial)  # of a writer that died
    partial.mkdir()
    return partial


def commit(partial: Path, manifest: Manifest) -> Path:
    """Make what was written a checkpoint, and return its place.

    One of the same tag is replaced, and is there until the new one is whole.

    Raises:
        OSError: there is no space, or the folder cannot be written.
    """
    folder = partial.parent
    files = {}
    for path in sorted(each for each in partial.rglob("*") if each.is_file()):
        _sync(path)
        name = path.relative_to(partial).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": _hash(path)}
    whole = asdict(manifest) | {"files": files}
    _write(partial / MANIFEST, json.dumps(whole, indent=1))
    for inner in (path for path in partial.rglob("*") if path.is_dir()):
        _sync(inner)
    _sync(partial)
    place = folder / manifest.tag
    old = folder / f".{manifest.tag}.old"
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    partial.rename(place)
    _sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    if manifest.resumable:
        pointer = folder / f".{LATEST}.partial"
        _write(pointer, manifest.tag)
        pointer.replace(folder / LATEST)
        _sync(folder)
    return place


def read_manifest(place: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: it has none, or one that cannot be read.
    """
    try:
        found = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            raise CheckpointError(
                f"{place} must be in the format {FORMAT}, but is in {found.get('format')!r}; read "
                "it with the version that wrote it."
            )
        return Manifest(**found)
    except FileNotFoundError:
        raise CheckpointError(
            f"{place} must be a checkpoint, but has no {MANIFEST}: its writer died, or another "
            "tool wrote it."
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{place / MANIFEST} cannot be read: {error}.") from None


def checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """Return every checkpoint of a folder that has all of its files, the last written last."""
    found = []
    for place in folder.iterdir() if folder.is_dir() else ():
        hidden = place.name.startswith(".")
        # Its writer died between the two renames of a tag that it replaced.
        replaced = hidden and place.name.endswith(".old")
        stands_in = replaced and not (folder / place.name[1:-4]).exists()
        if place.is_dir() and (stands_in or not hidden):
            with contextlib.suppress(CheckpointError):
                manifest = read_manifest(place)
                if not any(faults(place, manifest, hashes=False)):
                    found.append((place, manifest))
    return sorted(found, key=lambda each: (each[1].created, each[1].step))


def is_begun(folder: Path) -> bool:
    """Return whether a folder holds checkpoints, whole or not, of this or of another tool."""
    return (folder / LATEST).exists() or any(folder.glob(f"*/{MANIFEST}"))


def find(folder: Path, tag: str | None = None) -> tuple[Path, Manifest]:
    """Return the checkpoint of a tag, or the newest complete one, proved whole by its hashes.

    Raises:
        FileNotFoundError: there is none; a run that was to be resumed must not begin anew.
        CheckpointError: the one that was asked for is not whole; the message names the others.
    """
    whole = checkpoints(folder)
    names = ", ".join(place.name for place, _ in whole) or "none"
    if tag is None:
        return _newest(folder, [each for each in whole if each[1].resumable])
    place = folder / tag
    if not place.is_dir():
        raise FileNotFoundError(
            f"{folder} must hold the checkpoint {tag!r}, but holds {names} instead."
        )
    manifest = read_manifest(place)
    wrong = list(faults(place, manifest))
    if wrong:
        others = ", ".join(each.name for each, _ in whole if each != place) or "none"
        raise CheckpointError(
            f"{place} must be whole, but {'; '.join(wrong)}. Other complete ones: {others}."
        )
    return place, manifest


def _newest(folder: Path, whole: list[tuple[Path, Manifest]]) -> tuple[Path, Manifest]:
    for place, manifest in reversed(whole):
        wrong = list(faults(place, manifest))
        if not wrong:
            return place, manifest
        log.warning("%s is left out, it is damaged: %s", place, "; ".join(wrong))
    damaged = "".join(f" {text}" for text in _incomplete(folder))
    raise FileNotFoundError(
        f"{folder} must hold a checkpoint to resume from, but holds no complete one.{damaged} Give "
        'another folder, or begin anew without loading ("resume": "never").'
    )


def _incomplete(folder: Path) -> Iterator[str]:
    """Yield of each folder inside why it is no complete checkpoint."""
    inside = folder.iterdir() if folder.is_dir() else ()
    for place in sorted(each for each in inside if each.is_dir() and each.name[0] != "."):
        wrong = _damage(place)
        if wrong:
            yield wrong


def _damage(place: Path) -> str:
    try:
        wrong = "; ".join(faults(place, read_manifest(place)))
    except CheckpointError as error:
        return str(error)
    return f"{place.name} is damaged: {wrong}." if wrong else ""


def faults(place: Path, manifest: Manifest, *, hashes: bool = True) -> Iterator[str]:
    """Yield what is wrong with a checkpoint's files: missing, another size, another content."""
    for name, entry in manifest.files.items():
        path = place / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != entry["size"]:
            yield f"{name} has {path.stat().st_size:,} bytes instead of {entry['size']:,}"
        elif hashes and _hash(path) != entry["sha256"]:
            yield f"{name} has other content than was written"


def prune(folder: Path, keep: int | None, keep_every: int | None) -> list[str]:
    """Remove the oldest complete checkpoints but for the last ``keep``; return their tags.

    Args:
        folder: of all checkpoints of the run.
        keep: how many to keep; None keeps all.
        keep_every: those whose step is a multiple of it stay besides.
    """
    if keep is None:
        return []
    removed = []
    for place, manifest in checkpoints(folder)[:-keep]:
        if keep_every is None or manifest.step % keep_every:
            # Without its manifest it is no checkpoint any more, should this be cut short.
            (place / MANIFEST).unlink()
            shutil.rmtree(place)
            removed.append(place.name)
    return removed


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX can open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

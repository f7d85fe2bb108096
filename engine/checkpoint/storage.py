"""Write, find and validate the files of a checkpoint.

::

    DIR/latest              tag of the newest checkpoint, for DeepSpeed and other tools
    DIR/TAG/manifest.json   sizes and hashes of the files, package versions, identity of the run
    DIR/TAG/…               model, optimizer and all other saved states
    DIR/.TAG.partial/       a checkpoint whose save or removal is in progress or was interrupted

A directory without a manifest is not a complete checkpoint. The manifest is written last, and then
the directory is renamed from ``.TAG.partial`` to ``TAG``. The previous checkpoint therefore stays
complete if the process is killed during a save.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from engine.checkpoint.hashes import describe_files, matches_hash
from engine.checkpoint.manifest import MANIFEST, Manifest, format_manifest, read_manifest
from engine.config.versions import get_installed_version
from engine.errors import CheckpointError

__all__ = [
    "check_tag",
    "collect_versions",
    "commit",
    "create_directory",
    "create_partial",
    "discard",
    "discard_partials",
    "find",
    "find_damage",
    "has_any_checkpoint",
    "is_checkpoint",
    "list_checkpoints",
    "prune",
    "to_directory",
]

log = logging.getLogger("onecycle")

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
"""File in which DeepSpeed's `ds_to_universal` stores the tag of the universal checkpoint."""

_HOW_TO_RESUME = (
    'Use another directory, or set `engine.checkpoint.resume` to "never" to start from scratch.'
)


def check_tag(tag: str) -> None:
    """Check that a tag can be the name of a checkpoint.

    Raises:
        CheckpointError: if the tag is not a valid directory name, or is reserved.
    """
    is_name = tag.isprintable() and "/" not in tag and os.sep not in tag
    if not tag.strip() or not is_name or tag == LATEST or tag.startswith("."):
        raise CheckpointError(
            f"`tag` must be a valid directory name, got {tag!r}. Choose a tag such as `step100`. A "
            f"tag must not be `{LATEST}`, start with a dot, or contain slashes or unprintable "
            "characters."
        )


def to_directory(path: str | os.PathLike[str]) -> Path:
    """Convert the path of a directory to a `Path` object, and check that the path is not empty.

    Raises:
        ValueError: if ``path`` is empty or not a path.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(
            f"The checkpoint directory must be a non-empty path, got {path!r}. Pass a path such "
            'as "checkpoints", or "." for the working directory.'
        )
    return Path(path)


def create_directory(directory: Path) -> None:
    """Create the directory for a run's checkpoints, unless it already exists.

    Raises:
        OSError: if the directory cannot be created, or its path is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(
            20,
            "The checkpoint path is a file, not a directory; choose another path",
            str(directory),
        )
    directory.mkdir(parents=True, exist_ok=True)


def create_partial(directory: Path, tag: str) -> Path:
    """Create an empty directory ``.TAG.partial`` for a new checkpoint and return its path.

    Args:
        directory: existing directory that holds the run's checkpoints.
        tag: name of the checkpoint.

    Raises:
        OSError: if the directory is not writable.
    """
    partial = directory / f".{tag}.partial"
    discard(partial)  # left by a writer that was killed
    partial.mkdir()
    return partial


def discard(partial: Path) -> None:
    """Delete an incomplete checkpoint to free disk space."""
    if partial.is_symlink():
        partial.unlink()
    else:
        shutil.rmtree(partial, ignore_errors=True)


def discard_partials(directory: Path) -> None:
    """Delete the incomplete checkpoints that killed processes left behind."""
    for partial in directory.glob(".*.partial"):
        if partial.is_dir():
            discard(partial)


def commit(partial: Path, manifest: Manifest) -> Path:
    """Complete a checkpoint: write its manifest, and rename the partial directory to its tag.

    An existing checkpoint with the same tag is replaced when the new checkpoint is complete.

    Args:
        partial: directory returned by `create_partial`, after all files have been written to it.
        manifest: manifest to write. This function fills in the fields ``files`` and ``sequence``.

    Returns:
        The directory of the complete checkpoint.

    Raises:
        OSError: if the disk is full or the directory is not writable.
    """
    directory = partial.parent
    paths = sorted(each for each in partial.rglob("*") if each.is_file())
    for path in paths:
        _sync(path)
    files = describe_files(paths, partial)
    sequences = (each.sequence for _, each in list_checkpoints(directory))
    manifest = replace(manifest, files=files, sequence=1 + max(sequences, default=0))
    _write(partial / MANIFEST, format_manifest(manifest))
    for inner in (path for path in partial.rglob("*") if path.is_dir()):
        _sync(inner)
    _sync(partial)
    checkpoint_dir = directory / manifest.tag
    old = directory / f".{manifest.tag}.old"
    if checkpoint_dir.is_symlink():
        checkpoint_dir.unlink()  # keep the checkpoint that the link points to
    elif checkpoint_dir.exists():
        shutil.rmtree(old, ignore_errors=True)
        checkpoint_dir.rename(old)
    partial.rename(checkpoint_dir)
    _sync(directory)
    shutil.rmtree(old, ignore_errors=True)
    if manifest.resumable:
        pointer = directory / f".{LATEST}.partial"
        _write(pointer, manifest.tag)
        pointer.replace(directory / LATEST)
        _sync(directory)
    return checkpoint_dir


def list_checkpoints(directory: Path) -> list[tuple[Path, Manifest]]:
    """Return the path and the manifest of each complete checkpoint, from oldest to newest.

    A checkpoint is complete if all files have the correct sizes. Hashes are not checked.
    """
    found = []
    for checkpoint_dir in directory.iterdir() if directory.is_dir() else ():
        hidden = checkpoint_dir.name.startswith(".")
        # A save that replaces a tag renames twice. If the writer was killed between the renames,
        # the old checkpoint is still complete under its temporary name.
        is_replaced = hidden and checkpoint_dir.name.endswith(".old")
        is_only_copy = is_replaced and not (directory / checkpoint_dir.name[1:-4]).exists()
        if checkpoint_dir.is_dir() and (is_only_copy or not hidden):
            with contextlib.suppress(CheckpointError):
                manifest = read_manifest(checkpoint_dir)
                if not any(find_damage(checkpoint_dir, manifest, hashes=False)):
                    found.append((checkpoint_dir, manifest))
    return sorted(found, key=lambda each: (each[1].sequence, each[1].created, each[1].step))


def is_checkpoint(directory: Path) -> bool:
    """Return whether a directory is itself a checkpoint, written by onecycle or DeepSpeed."""
    return (directory / MANIFEST).exists() or any(directory.glob("*_model_states.pt"))


def has_any_checkpoint(directory: Path) -> bool:
    """Return whether a directory contains a checkpoint of any kind.

    Damaged checkpoints and checkpoints of other tools, such as DeepSpeed, also count.
    """
    is_named = any((directory / name).exists() for name in (LATEST, LATEST_UNIVERSAL))
    return is_named or any(directory.glob(f"*/{MANIFEST}"))


def find(
    directory: Path, tag: str | None = None, hint: str = _HOW_TO_RESUME
) -> tuple[Path, Manifest]:
    """Find the checkpoint with the given tag, or the newest one, and verify its hashes.

    Args:
        directory: directory that holds the run's checkpoints.
        tag: name of the checkpoint. If None, damaged checkpoints are skipped, and the newest
            complete checkpoint whose manifest has ``resumable`` set is used.
        hint: how to fix the error if no checkpoint is found and ``tag`` is None.

    Returns:
        The directory and the manifest of the checkpoint.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        CheckpointError: if the checkpoint with the given tag is incomplete or damaged.
    """
    complete = list_checkpoints(directory)
    names = ", ".join(checkpoint_dir.name for checkpoint_dir, _ in complete) or "none"
    if tag is None:
        return _find_newest(directory, [each for each in complete if each[1].resumable], hint)
    checkpoint_dir = directory / tag
    if not checkpoint_dir.is_dir():
        # The writer was killed while it replaced the tag.
        checkpoint_dir = next((d for d, m in complete if m.tag == tag), checkpoint_dir)
    if not checkpoint_dir.is_dir():
        raise FileNotFoundError(
            f"{directory} does not contain the checkpoint {tag!r}. Complete checkpoints: {names}."
        )
    manifest = read_manifest(checkpoint_dir)
    problems = list(find_damage(checkpoint_dir, manifest))
    if problems:
        others = ", ".join(each.name for each, _ in complete if each != checkpoint_dir) or "none"
        raise CheckpointError(
            f"{checkpoint_dir} is damaged: {'; '.join(problems)}. Other complete checkpoints: "
            f"{others}."
        )
    return checkpoint_dir, manifest


def _find_newest(
    directory: Path, complete: list[tuple[Path, Manifest]], hint: str
) -> tuple[Path, Manifest]:
    for checkpoint_dir, manifest in reversed(complete):
        problems = list(find_damage(checkpoint_dir, manifest))
        if not problems:
            return checkpoint_dir, manifest
        log.warning("skipping the damaged checkpoint %s: %s", checkpoint_dir, "; ".join(problems))
    damaged = "".join(f" {text}" for text in _describe_incomplete(directory))
    raise FileNotFoundError(f"{directory} contains no complete checkpoint.{damaged} {hint}")


def _describe_incomplete(directory: Path) -> Iterator[str]:
    """Yield a message for each subdirectory that contains an incomplete or damaged checkpoint."""
    inside = directory.iterdir() if directory.is_dir() else ()
    for checkpoint_dir in sorted(each for each in inside if each.is_dir() and each.name[0] != "."):
        message = _describe_damage(checkpoint_dir)
        if message:
            yield message


def _describe_damage(checkpoint_dir: Path) -> str:
    try:
        problems = "; ".join(find_damage(checkpoint_dir, read_manifest(checkpoint_dir)))
    except CheckpointError as error:
        return str(error)
    return f"{checkpoint_dir.name} is damaged: {problems}." if problems else ""


def find_damage(checkpoint_dir: Path, manifest: Manifest, *, hashes: bool = True) -> Iterator[str]:
    """Yield a message for each file that is missing or does not match the manifest.

    Args:
        checkpoint_dir: directory of the checkpoint.
        manifest: manifest of the checkpoint.
        hashes: whether to read all files and check their hashes. File sizes are always checked.
    """
    for name, entry in manifest.files.items():
        path = checkpoint_dir / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != entry["size"]:
            yield f"{name} has {path.stat().st_size:,} bytes instead of {entry['size']:,}"
        elif hashes and not matches_hash(path, entry):
            yield f"{name} does not match its hash"


def prune(directory: Path, run: str, keep: int | None, keep_every: int | None) -> list[str]:
    """Delete old checkpoints that a run saved automatically, and return their tags.

    Args:
        directory: directory that holds the run's checkpoints.
        run: identifier of the run.
        keep: number of newest checkpoints to keep; None keeps all.
        keep_every: interval in optimizer steps. Checkpoints at multiples of this interval are never
            deleted. If None, only the newest ``keep`` checkpoints are kept.
    """
    if keep is None:
        return []
    own = [
        (checkpoint_dir, manifest)
        for checkpoint_dir, manifest in list_checkpoints(directory)
        if manifest.is_automatic and manifest.run == run and not checkpoint_dir.is_symlink()
    ]
    removed = []
    for checkpoint_dir, manifest in own[:-keep]:
        if keep_every is None or manifest.step % keep_every:
            # If the removal is interrupted, the next run deletes the rest.
            partial = directory / f".{manifest.tag}.partial"
            discard(partial)
            checkpoint_dir.rename(partial)
            shutil.rmtree(partial)
            removed.append(checkpoint_dir.name)
    return removed


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX systems can open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def collect_versions() -> dict[str, str]:
    """Return the versions of Python, onecycle, torch and DeepSpeed."""
    versions = {"python": platform.python_version()}
    packages = ("onecycle", "torch", "deepspeed")
    return versions | {name: found for name in packages if (found := get_installed_version(name))}

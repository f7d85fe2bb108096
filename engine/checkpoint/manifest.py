"""Read and format manifests, which list a checkpoint's files and describe its training run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from engine.checkpoint.hashes import find_hash
from engine.errors import CheckpointError, escape

__all__ = ["MANIFEST", "Manifest", "format_manifest", "read_manifest"]

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``, which describes a checkpoint.

    ``files`` maps each file's relative path to its size in bytes and its hash. ``identity``
    contains the settings that must be the same in a run that resumes from the checkpoint.
    ``versions`` contains the versions of Python and of the packages used to write the checkpoint.
    """

    tag: str
    step: int
    world_size: int
    backend: str
    identity: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    resumable: bool = True
    """Whether this checkpoint may be chosen when a checkpoint is loaded without a tag."""
    frozen: bool = True
    """Whether the checkpoint contains the frozen parameters."""
    run: str = ""
    """Identifier of the run. A resumed run keeps its identifier."""
    is_automatic: bool = False
    """Whether the checkpoint was saved automatically. `prune` deletes only such checkpoints."""
    best: Mapping[str, Any] | None = None
    """The metric that selects the best checkpoint, with its best ``value`` so far and the ``step``
    of this value; None if no metric is tracked or no value has been reported."""
    sequence: int = 0
    """Number that increases with each save in a directory, used to sort the checkpoints."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    checksum: str = ""
    """SHA-256 hash of the rest of the manifest; empty in manifests of older onecycle versions."""
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Total size of the checkpoint's files in bytes."""
        return sum(entry["size"] for entry in self.files.values())


def format_manifest(manifest: Manifest) -> str:
    """Return a manifest as JSON, with a checksum of its contents."""
    content = asdict(manifest)
    return json.dumps({**content, "checksum": _compute_checksum(content)}, indent=1)


def read_manifest(checkpoint_dir: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: if the manifest is missing or damaged, or has an unsupported format.
    """
    path = checkpoint_dir / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint_dir} is not a complete checkpoint because {MANIFEST} is missing. Either "
            "the save was interrupted, or another tool wrote the directory."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} is damaged: expected a JSON object, got {type(found).__name__}. Use another "
            "checkpoint."
        )
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {found.get('format')!r}, but this version of onecycle reads only "
            f"format {FORMAT}. Load the checkpoint with the version of onecycle that wrote it."
        )
    for name, is_valid in _CHECKS.items():
        if name in found and not is_valid(found[name]):
            raise CheckpointError(
                f"{path} is damaged: the value of `{name}` is invalid. Use another checkpoint."
            )
    names = {each.name for each in fields(Manifest)}
    required = {"tag", "step", "world_size", "backend", "identity", "versions", "created"}
    if not required <= found.keys() <= names:
        wrong = escape(", ".join(sorted((required - found.keys()) | (found.keys() - names))))
        raise CheckpointError(
            f"{path} is damaged: some keys are missing or unknown ({wrong}). Use another "
            "checkpoint."
        )
    if "checksum" in found and found["checksum"] != _compute_checksum(found):
        raise CheckpointError(
            f"{path} is damaged: it does not match its checksum. Use another checkpoint."
        )
    return Manifest(**found)


def _compute_checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _is_best(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and isinstance(value.get("metric"), str)
        and isinstance(value.get("value"), (int, float))
        and _is_count(value.get("step"))
    )


def _are_files(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict)
        and _is_count(entry.get("size"))
        and find_hash(entry) is not None
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        for name, entry in value.items()
    )


_CHECKS: dict[str, Callable[[object], bool]] = {
    "tag": _is_text,
    "step": _is_count,
    "world_size": _is_count,
    "backend": lambda value: value in ("torch", "deepspeed"),
    "identity": _is_mapping,
    "versions": _is_mapping,
    "created": _is_text,
    "resumable": _is_flag,
    "best": _is_best,
    "frozen": _is_flag,
    "run": _is_text,
    "is_automatic": _is_flag,
    "sequence": _is_count,
    "files": _are_files,
    "checksum": _is_text,
}
"""Maps each key of the manifest to a function that checks the key's value."""

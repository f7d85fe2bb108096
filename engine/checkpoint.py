"""Checkpoints: everything that a run needs to go on, in one folder a tag."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["read", "write"]

STATE = "state.pt"
LATEST = "latest"


def write(folder: Path, tag: str, state: Mapping[str, Any], *, save_latest: bool) -> None:
    """Write a state to ``folder/tag``, then let ``folder/latest`` name it.

    Both are written beside and renamed, so that a reader finds the old one or the new one whole.

    Raises:
        OSError: the folder cannot be written; what it held is still there.
    """
    (folder / tag).mkdir(parents=True, exist_ok=True)
    partial = folder / tag / f"{STATE}.partial"
    torch.save(dict(state), partial)
    partial.replace(folder / tag / STATE)
    if save_latest:
        pointer = folder / f"{LATEST}.partial"
        pointer.write_text(tag, encoding="utf-8")
        pointer.replace(folder / LATEST)


def read(folder: Path, tag: str | None) -> tuple[Path, dict[str, Any]]:
    """Return the path and the state of a tag, or of the one that ``folder/latest`` names.

    Nothing but tensors and plain values is unpickled.

    Raises:
        FileNotFoundError: there is no such checkpoint; a run that was to be resumed must not begin
            anew in silence.
    """
    if tag is None:
        pointer = folder / LATEST
        if not pointer.is_file():
            raise FileNotFoundError(
                f"{folder} must hold a checkpoint to resume from, but has no file `{LATEST}`. "
                f"Give a tag, or begin anew without `load_checkpoint`."
            )
        tag = pointer.read_text(encoding="utf-8").strip()
    path = folder / tag / STATE
    if not path.is_file():
        others = sorted(entry.parent.name for entry in folder.glob(f"*{os.sep}{STATE}"))
        raise FileNotFoundError(
            f"{folder} must hold the checkpoint {tag!r}, but holds "
            f"{', '.join(others) or 'none'} instead."
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return path.parent, state

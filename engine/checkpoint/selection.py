"""Select the onecycle or DeepSpeed checkpoint to load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import storage
from engine.checkpoint.collectives import call_on_rank_0, raise_on_all_ranks
from engine.checkpoint.deepspeed_files import DeepSpeedFiles, has_deepspeed_files
from engine.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from engine.checkpoint.plain_values import report_damage
from engine.checkpoint.saved_run import check_foreign_run, read_run
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.errors import CheckpointError

__all__ = ["RUN_STATE", "CheckpointSelector", "Selected", "find_foreign"]

RUN_STATE = "engine.pt"
"""Name of the file that stores the state of a run, except for the model and the optimizer."""


@dataclass(frozen=True)
class Selected:
    """A checkpoint to load."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    """State of the run, except for the model and the optimizer."""
    is_foreign: bool
    """Whether DeepSpeed wrote the checkpoint without onecycle."""


class CheckpointSelector:
    """Selector that finds the checkpoint with a given tag, or the newest checkpoint.

    Args:
        config: config of the run.
        ranks: rank and world size of this process.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self._loads_universal = bool(config.raw.get("checkpoint", {}).get("load_universal"))

    def select(self, directory: Path, tag: str | None) -> Selected:
        """Return the checkpoint that rank 0 chooses, and check that all ranks read the same files.

        Rank 0 verifies the hashes of a onecycle checkpoint's files. The other ranks check only the
        file sizes.

        Args:
            directory: directory that holds the run's checkpoints.
            tag: name of the checkpoint; None selects the newest checkpoint.

        Raises:
            FileNotFoundError: if the checkpoint does not exist.
            CheckpointError: if the checkpoint is damaged, or the ranks have different files.
        """
        name, is_foreign, manifest = call_on_rank_0(
            self._ranks, lambda: self._choose(directory, tag)
        )
        checkpoint_dir = directory / name
        with raise_on_all_ranks(self._ranks, "The checkpoint was not loaded"):
            if is_foreign:
                own, state = self._describe_foreign(checkpoint_dir)
                problems = []
            else:
                own = read_manifest(checkpoint_dir)
                problems = list(storage.find_damage(checkpoint_dir, own, hashes=False))
            if own != manifest or problems:
                what = "; ".join(problems) or "its manifest differs"
                raise CheckpointError(
                    f"{checkpoint_dir} differs between rank 0 and rank {self._ranks.rank}: "
                    f"{what}. Use a directory that all hosts share."
                )
            if not is_foreign:
                trusts = self._config.checkpoint.trust_pickle
                state = read_run(checkpoint_dir / RUN_STATE, trusts=trusts)
        return Selected(checkpoint_dir, manifest, state, is_foreign)

    def _choose(self, directory: Path, tag: str | None) -> tuple[str, bool, Manifest]:
        foreign = self._find_foreign(directory, tag)
        if foreign is not None:
            return foreign.name, True, self._describe_foreign(foreign)[0]
        path, manifest = storage.find(directory, tag)
        return path.name, False, manifest

    def _find_foreign(self, directory: Path, tag: str | None) -> Path | None:
        """Return the path of the DeepSpeed checkpoint to load.

        Return None if a onecycle checkpoint should be loaded instead.
        """
        pointer = directory / storage.LATEST_UNIVERSAL
        universal = _follow(pointer) if self._loads_universal and tag is None else None
        if universal is not None:
            own = [manifest for _, manifest in storage.list_checkpoints(directory)]
            # If the run has since saved its own checkpoints, resume from these checkpoints instead.
            steps = DeepSpeedFiles(universal, trusts=self._config.checkpoint.trust_pickle).steps
            if all(manifest.step <= steps for manifest in own):
                return universal
        return find_foreign(directory, tag)

    def _describe_foreign(self, checkpoint_dir: Path) -> tuple[Manifest, dict[str, Any]]:
        files = DeepSpeedFiles(checkpoint_dir, trusts=self._config.checkpoint.trust_pickle)
        manifest = Manifest(
            tag=checkpoint_dir.name,
            step=files.steps,
            world_size=files.world_size,
            backend="deepspeed",
            identity={},
            versions={},
            created="",
        )
        with report_damage(checkpoint_dir):
            state = files.read_run_state(self._config.batch.train)
            check_foreign_run(state)
        return manifest, state


def find_foreign(directory: Path, tag: str | None) -> Path | None:
    """Return the path of a checkpoint that DeepSpeed wrote without onecycle.

    Return None if there is no such checkpoint, or if onecycle wrote the checkpoint.

    Args:
        directory: directory that holds the checkpoints.
        tag: name of the checkpoint; None to read the name from the file ``latest``.
    """
    if tag is None:
        return _follow(directory / storage.LATEST)
    return directory / tag if _is_foreign(directory / tag) else None


def _follow(pointer: Path) -> Path | None:
    """Return the path of the DeepSpeed checkpoint that is named in a file such as ``latest``.

    Return None if there is no such file or no such checkpoint, or if onecycle wrote the checkpoint.
    """
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    checkpoint_dir = pointer.parent / name
    return checkpoint_dir if name and _is_foreign(checkpoint_dir) else None


def _is_foreign(checkpoint_dir: Path) -> bool:
    return not (checkpoint_dir / MANIFEST).exists() and has_deepspeed_files(checkpoint_dir)

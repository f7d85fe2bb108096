"""Read parameters and optimizer states, by name, from checkpoints that DeepSpeed's engine wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.checkpoint.deepspeed_pickles import read_file
from engine.checkpoint.plain_values import report_damage
from engine.checkpoint.structure import check_same_structure
from engine.errors import CheckpointError
from schedules.core.saved_state import Count, Size, restore

__all__ = [
    "SCHEDULE_KEYS",
    "DeepSpeedFiles",
    "SavedTensor",
    "convert_run_state",
    "has_deepspeed_files",
]

_MODEL = re.compile(r"(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)(_\d+)?_model_states\.pt")
_OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_\d+_optim_states\.pt")
_UNIVERSAL = "zero"  # directory of a universal checkpoint
_OTHER_CLIENT_STATE = "onecycle_client_state"
"""Key in a model file for the values of ``client_state`` under keys that DeepSpeed uses itself."""
SCHEDULE_KEYS = frozenset({"type", "params", "step"})
"""Keys that only the state of a `ScheduleBinder` has."""
_OWN_KEYS = frozenset(
    """
    module buffer_names optimizer param_shapes frozen_param_shapes shared_params
    frozen_param_fragments lr_scheduler data_sampler random_ltd skipped_steps global_steps
    global_samples dp_world_size mp_world_size checkpoint_parallel_dimensions ds_config ds_version
    num_experts ds_autoep_layers autoep_layers universal_checkpoint_info folding
    onecycle_client_state
    """.split()  # noqa: SIM905  # readable at a glance, unlike a column of strings
)
"""Keys in a model file that are not from the script's ``client_state``."""
_COUNTS = {"global_steps": Count, "skipped_steps": Count, "dp_world_size": Size}
"""Types of the numbers that a model file must contain, by key."""


class SavedTensor(NamedTuple):
    """Tensor in a checkpoint. If possible, its elements are read from the file on first use."""

    shape: torch.Size
    parts: list[Tensor]
    """Flat tensors that contain the elements in order. The last one may end with padding."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the saved tensor."""
        return self.parts[0].dtype

    def read(self) -> Tensor:
        """Return the whole tensor."""
        whole = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        return whole.detach()[: self.shape.numel()].view(self.shape)


class _Piece(NamedTuple):
    """The part of a parameter that is stored in one rank's flat tensors."""

    states: Mapping[str, Any]
    """Optimizer state of the flat tensor that contains this part."""
    master: Tensor | None
    """Flat tensor of float32 master weights; None if the checkpoint does not contain any."""
    start: int
    size: int


def has_deepspeed_files(checkpoint_dir: Path) -> bool:
    """Return whether a directory is a checkpoint in DeepSpeed's format."""
    return any(_MODEL.fullmatch(path.name) for path in checkpoint_dir.glob("*_model_states.pt"))


def convert_run_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a run's scheduler state and ``client_state`` to entries of DeepSpeed's model file.

    `DeepSpeedFiles.read_run_state` reads these entries, and so does DeepSpeed without onecycle.

    Args:
        state: saved state of a run on the DeepSpeed backend.

    >>> convert_run_state({"lr_scheduler": None, "client_state": {"epoch": 3, "optimizer": "mine"}})
    {'lr_scheduler': None, 'epoch': 3, 'onecycle_client_state': {'optimizer': 'mine'}}
    """
    scheduler, client_state = state["lr_scheduler"], state["client_state"]
    if scheduler is not None and scheduler.keys() >= SCHEDULE_KEYS and "state" not in scheduler:
        # Resuming needs only the step, which DeepSpeed's schedulers read under this name.
        scheduler = {"last_batch_iteration": scheduler["step"] - 1}
    reserved = {key: value for key, value in client_state.items() if key in _OWN_KEYS}
    return {
        "lr_scheduler": scheduler,
        **{key: value for key, value in client_state.items() if key not in _OWN_KEYS},
        **({_OTHER_CLIENT_STATE: reserved} if reserved else {}),
    }


class DeepSpeedFiles:
    """A checkpoint in DeepSpeed's format.

    Args:
        checkpoint_dir: directory of the checkpoint.
        trusts: whether to unpickle objects of any class. Unpickling such objects can execute
            arbitrary code from the files.

    Raises:
        CheckpointError: if a file is damaged or contains untrusted objects.
    """

    def __init__(self, checkpoint_dir: Path, *, trusts: bool = False) -> None:
        self.directory = checkpoint_dir
        self._trusts = trusts
        named = _match_names(checkpoint_dir, _MODEL)
        self.is_split = any(int(match["part"]) for match, _ in named) or any(
            checkpoint_dir.glob("layer_*")
        )
        """Whether the model is split by tensor, pipeline or expert parallelism."""
        self._paths = [path for match, path in named if int(match["part"]) == 0]
        self._is_stage_3 = bool(named) and named[0][0]["rank"] is not None
        if not self._paths:
            raise CheckpointError(
                f"{checkpoint_dir} does not contain a DeepSpeed checkpoint. Load a checkpoint that "
                "was saved with the DeepSpeed backend."
            )
        self._model = read_file(self._paths[0], trusts=trusts)
        with report_damage(self._paths[0]):
            _check_header(self._model)

    @property
    def is_universal(self) -> bool:
        """Whether this is a universal checkpoint, which any number of ranks can load."""
        return (self.directory / _UNIVERSAL).is_dir()

    @property
    def steps(self) -> int:
        """Number of completed steps, including skipped steps."""
        return int(self._model["global_steps"])

    @property
    def world_size(self) -> int:
        """Number of data-parallel ranks that wrote the checkpoint."""
        return int(self._model["dp_world_size"])

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the saved run; 1 for stages 1 and 2, which write the same files."""
        if self._model["module"] is not None and self._model.get("param_shapes") is None:
            return 0
        return 3 if self._is_stage_3 else 1

    def read_run_state(self, default_batch: int) -> dict[str, Any]:
        """Return the saved state of the run, except the states of the model and the optimizer.

        Args:
            default_batch: global batch size to use if the checkpoint does not contain it.
        """
        saved, steps = self._model, self.steps
        samples = saved.get("global_samples")
        batch = samples // steps if samples and steps else default_batch
        return {
            "lr_scheduler": saved.get("lr_scheduler"),
            "counters": {
                "global_steps": steps,
                "global_samples": steps * batch if samples is None else samples,
                "skipped_steps": saved["skipped_steps"],
            },
            "batch": {"train": batch, "accumulation": None},  # unknown
            "client_state": {
                **{key: saved[key] for key in saved if key not in _OWN_KEYS},
                **(saved.get(_OTHER_CLIENT_STATE) or {}),
            },
        }

    def find_weights(self, groups: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
        """Return the model's parameters, buffers and extra state by name.

        Parameters are in float32 if the checkpoint contains their master weights. Otherwise, they
        are in the dtype of the saved model. The extra state consists of the values returned
        by the modules' ``get_extra_state`` methods.

        Args:
            groups: names of the parameters in each of the optimizer's param groups. Required to
                find the master weights of a run without ZeRO.
        """
        pieces = self._find_pieces(groups)
        weights: dict[str, Any] = {}
        for name, tensor in self._model["module"].items():
            source = self._aliases.get(name, name)
            parts = pieces.get(source, [])
            if parts and parts[0].master is not None:
                weights[name] = self._join(source, parts, [part.master for part in parts])
            elif source in self._frozen:
                weights[name] = self._frozen[source]
            elif isinstance(tensor, Tensor):
                weights[name] = SavedTensor(tensor.shape, [tensor.flatten()])
            else:
                weights[name] = tensor
        return weights

    def find_optimizer_states(self, groups: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
        """Return the optimizer state of each trainable parameter, by name.

        Args:
            groups: names of the parameters in each of the optimizer's param groups.
        """
        found: dict[str, dict[str, Any]] = {}
        found_pieces = self._find_pieces(groups).items()
        # FusedAdam counts the steps in its param groups, too.
        counts = [group["step"] for group in self.find_param_groups() if "step" in group]
        for name, pieces in found_pieces:
            state: dict[str, Any] = {"step": counts[0]} if counts and pieces[0].states else {}
            for key, value in pieces[0].states.items():
                state[key] = value
                if isinstance(value, Tensor) and value.dim() > 0:
                    state[key] = self._join(name, pieces, [piece.states[key] for piece in pieces])
            found[name] = state
        return found

    def find_param_groups(self) -> list[dict[str, Any]]:
        """Return the settings of each param group, or [] if the saved run had no optimizer."""
        saved = self._model.get("optimizer") or self._first_shard
        for key in ("base_optimizer_state", "optimizer_state_dict"):
            saved = saved.get(key, saved) if isinstance(saved, dict) else {}
        groups: list[dict[str, Any]] = saved.get("param_groups", [])
        return groups

    def read_loss_scaler(self) -> dict[str, Any] | None:
        """Return a state dict for `LossScaler`, or None if the run used a static loss scale."""
        holder = self._model.get("optimizer") or self._first_shard
        scaler = vars(holder["loss_scaler"]) if "loss_scaler" in holder else holder
        if "last_overflow_iter" not in scaler:
            return None
        return {
            "scale": scaler["cur_scale"],
            "hysteresis": scaler.get("cur_hysteresis", 1),
            "clean_updates": scaler["cur_iter"] - scaler["last_overflow_iter"] - 1,
        }

    def get_shapes(self) -> dict[str, tuple[list[int], str]]:
        """Return the shape and the dtype of each saved parameter and buffer, by name."""
        return {
            name: (
                list(self._shapes.get(self._aliases.get(name, name), tensor.shape)),
                str(tensor.dtype).removeprefix("torch."),
            )
            for name, tensor in self._model["module"].items()
            if isinstance(tensor, Tensor)
        }

    def get_trained_shapes(self) -> list[list[int]] | None:
        """Return the shapes of all trainable parameters, or None if they are unknown.

        The shapes are sorted, so that they can be compared with the shapes of another run even if
        DeepSpeed has reordered the parameters or split param groups.
        """
        groups = self._model.get("param_shapes")
        return groups and sorted(list(shape) for group in groups for shape in group.values())

    @cached_property
    def _aliases(self) -> dict[str, str]:
        """Maps each alias of a tied parameter to the name under which it is saved."""
        return dict(self._model.get("shared_params") or {})

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        """Full parameter shapes, by name. DeepSpeed saves them only if the run uses ZeRO."""
        groups = [
            *(self._model.get("param_shapes") or []),
            self._model.get("frozen_param_shapes") or {},
        ]
        return {name: shape for group in groups for name, shape in group.items()}

    @cached_property
    def _frozen(self) -> dict[str, SavedTensor]:
        """Maps the name of each frozen parameter to its tensor; empty except in ZeRO stage 3."""
        shapes = self._model.get("frozen_param_shapes") or {}
        if self.zero_stage != 3 or not shapes:
            return {}
        files = [read_file(path, trusts=self._trusts) for path in self._paths]
        fragments = [file["frozen_param_fragments"] for file in files]
        return {
            name: SavedTensor(shape, [each[name].flatten() for each in fragments])
            for name, shape in shapes.items()
        }

    @cached_property
    def _shards(self) -> list[Mapping[str, Any]]:
        """The state of each rank's ZeRO optimizer."""
        paths = [path for _, path in _match_names(self.directory, _OPTIMIZER)]
        if len(paths) != self.world_size:
            raise CheckpointError(
                f"{self.directory} is incomplete: it has the optimizer states of {len(paths)} of "
                f"{self.world_size} ranks. Use another checkpoint."
            )
        return [self._first_shard, *(self._read_shard(path) for path in paths[1:])]

    @cached_property
    def _first_shard(self) -> Mapping[str, Any]:
        found = _match_names(self.directory, _OPTIMIZER)
        return self._read_shard(found[0][1]) if found else {}

    def _read_shard(self, path: Path) -> Mapping[str, Any]:
        content: Mapping[str, Any] = read_file(path, trusts=self._trusts)["optimizer_state_dict"]
        return content

    def _find_pieces(self, groups: Sequence[Sequence[str]]) -> dict[str, list[_Piece]]:
        problems = {
            "is a universal checkpoint": self.is_universal,
            "contains a model that is split by tensor, pipeline or expert parallelism": (
                self.is_split
            ),
            "contains states that were offloaded to NVMe": (
                (self.directory / "offloaded_tensors").is_dir()
            ),
        }
        for problem, applies in problems.items():
            if applies:
                raise CheckpointError(
                    f"{self.directory} {problem}. Load it with the DeepSpeed backend."
                )
        pieces: dict[str, list[_Piece]] = {}
        found = self._find_sharded() if self.zero_stage else self._find_whole(groups)
        for name, piece in found:
            pieces.setdefault(name, []).append(piece)
        return pieces

    def _find_sharded(self) -> Iterator[tuple[str, _Piece]]:
        for shard in self._shards:
            if "fp32_flat_groups" in shard:
                yield from self._find_in_stage_3(shard)
                continue
            saved = shard["base_optimizer_state"]
            states = saved["state"] if isinstance(saved, dict) else {}  # the legacy elastic format
            masters = shard["single_partition_of_fp32_groups"]
            for index, names in enumerate(shard["param_slice_mappings"]):
                for name, place in names.items():
                    piece = _Piece(states.get(index, {}), masters[index], place.start, place.numel)
                    yield name, piece

    def _find_in_stage_3(self, shard: Mapping[str, Any]) -> Iterator[tuple[str, _Piece]]:
        states = shard["optimizer_state_dict"]["state"]
        for index, shapes in enumerate(self._model["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                count = math.ceil(shape.numel() / self.world_size)
                master = shard["fp32_flat_groups"][index]
                yield name, _Piece(states.get(index, {}), master, start, count)
                start += count

    def _find_whole(self, groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, _Piece]]:
        """Yield the name and the `_Piece` of each parameter in ``groups``, for a run without ZeRO.

        Without ZeRO, DeepSpeed saves the optimizer states in the order of the parameters, but
        without names.
        """
        saved = self._model.get("optimizer") or {}
        states = saved.get("optimizer_state_dict", saved).get("state", {})
        flat = saved.get("fp32_groups_flat")
        whole = [each for group in saved.get("fp32_groups", []) for each in group]
        index = 0
        for number, names in enumerate(groups):
            start = 0
            for name in names:
                if name not in self._model["module"]:
                    index += 1
                    continue
                count = self._model["module"][name].numel()
                if flat is not None:
                    yield name, _Piece(states.get(number, {}), flat[number], start, count)
                else:
                    master = whole[index] if index < len(whole) else None
                    yield name, _Piece(states.get(index, {}), master, 0, count)
                start, index = start + count, index + 1

    def _join(self, name: str, pieces: list[_Piece], flat_tensors: list[Any]) -> SavedTensor:
        shape = self._shapes.get(name, self._model["module"][name].shape)
        parts = [
            flat.flatten()[piece.start : piece.start + piece.size]
            for piece, flat in zip(pieces, flat_tensors, strict=True)
        ]
        return SavedTensor(shape, parts)


def _check_header(model: Any) -> None:
    """Check the values that this module reads from a model file.

    Raises:
        ValueError: if a value is missing, has the wrong type or is out of range.
    """
    check_same_structure(model, dict.fromkeys((*_COUNTS, "module")), "checkpoint")
    for key, kind in _COUNTS.items():
        restore(kind, model[key], key)
    restore(Count | None, model.get("global_samples"), "global_samples")
    for key in ("module", "optimizer", "shared_params", _OTHER_CLIENT_STATE):
        restore(dict[Any, Any] | None, model.get(key), key)


def _match_names(directory: Path, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], Path]]:
    """Return the files whose names match ``pattern``, each with its regex match, sorted by rank."""
    matches = ((pattern.fullmatch(path.name), path) for path in directory.iterdir())
    found = [(match, path) for match, path in matches if match is not None]
    return sorted(found, key=lambda each: int(each[0]["rank"] or 0))

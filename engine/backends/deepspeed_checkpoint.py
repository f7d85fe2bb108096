"""Check a checkpoint before DeepSpeed loads it, and control how DeepSpeed reads the files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from engine.checkpoint.collectives import raise_on_all_ranks
from engine.checkpoint.deepspeed_files import DeepSpeedFiles, convert_run_state
from engine.checkpoint.deepspeed_pickles import import_classes
from engine.checkpoint.optimizer_state import KEPT_SETTINGS
from engine.checkpoint.plain_values import TRUST_FIX, read_values, report_damage, unpickle
from engine.checkpoint.selection import RUN_STATE
from engine.checkpoint.structure import check_same_structure
from engine.distributed.ranks import Ranks
from engine.errors import CheckpointError

__all__ = [
    "check_sharding",
    "collect_extra_entries",
    "keep_implementation",
    "read_scaler",
    "refuse_pickled_code",
    "report_damage_on_all_ranks",
    "set_format",
]


@contextlib.contextmanager
def report_damage_on_all_ranks(checkpoint_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Raise an exception on all ranks if the ``with`` block fails on any rank.

    Args:
        checkpoint_dir: directory of the checkpoint, for the error message.
        ranks: rank and world size of this process.

    Raises:
        CheckpointError: the block raised an exception on this rank.
        RuntimeError: the block raised an exception on another rank only.
    """
    with (
        raise_on_all_ranks(ranks, "The checkpoint was not loaded"),
        report_damage(checkpoint_dir),
    ):
        yield


def read_scaler(path: Path, scaler: Any) -> Any:
    """Read and check the state of PyTorch's ``GradScaler``.

    Args:
        path: file that contains the state.
        scaler: ``GradScaler`` of this run; None if the run does not use one.

    Returns:
        The state; None if the file does not exist or ``scaler`` is None.

    Raises:
        CheckpointError: the file is damaged.
    """
    if scaler is None or not path.is_file():
        return None
    saved = read_values(path)
    with report_damage(path):
        check_same_structure(saved, scaler.state_dict(), "grad_scaler")
    return saved


@contextlib.contextmanager
def refuse_pickled_code() -> Iterator[None]:
    """Inside this context, reject checkpoint files that could run code when DeepSpeed loads them.

    Only tensors, plain Python values and instances of DeepSpeed's own classes are unpickled.
    Without this context, DeepSpeed calls ``torch.load`` with ``weights_only=False``. DeepSpeed has
    no setting to change this argument.

    Raises:
        CheckpointError: a file contains an object of any other class.
    """
    allowed, original = import_classes(), torch.load

    def load(path: Any, *_: Any, mmap: bool | None = None, **_settings: Any) -> Any:
        return unpickle(path, allowed, load=original, mmap=mmap, fix=TRUST_FIX)

    with _replace(torch, "load", load):
        yield


@contextlib.contextmanager
def set_format(engine: Any, files: DeepSpeedFiles) -> Iterator[None]:
    """Inside this context, make DeepSpeed's engine expect the checkpoint format of ``files``.

    The format is either the sharded format that DeepSpeed saves or the universal format.

    Raises:
        CheckpointError: the checkpoint is universal, but ``checkpoint.load_universal`` is not true.
    """
    if files.is_universal and not engine.load_universal_checkpoint():
        raise CheckpointError(
            f"{files.directory} is a universal checkpoint. To load it, set "
            "`checkpoint.load_universal` to true."
        )
    with _replace(engine._config, "load_universal_checkpoint", files.is_universal):  # noqa: SLF001  # it has no setter
        yield


def collect_extra_entries(engine: Any, checkpoint_dir: Path, *, trusts: bool) -> dict[str, Any]:
    """Return the entries to add to DeepSpeed's model file when a checkpoint is saved.

    They contain the ``client_state`` and the state of the scheduler, so that DeepSpeed without
    onecycle can load them, and so that `ds_to_universal` keeps them.

    Args:
        engine: DeepSpeed's engine.
        checkpoint_dir: directory that rank 0 has written the state of the run to. A snapshot does
            not contain this state.
        trusts: whether the state may contain objects of any class.
    """
    entries = _describe_for_conversion(engine)
    if (path := checkpoint_dir / RUN_STATE).is_file():
        entries |= convert_run_state(read_values(path, trusts=trusts))
    return entries


def _describe_for_conversion(engine: Any) -> dict[str, Any]:
    """Return the entry that DeepSpeed's `ds_to_universal` requires in the model file, as a dict.

    The dict is empty if DeepSpeed saves the entry itself or the model has MoE layers.
    """
    from deepspeed.checkpoint import constants

    info = constants.UNIVERSAL_CHECKPOINT_INFO
    if engine.has_moe_layers or hasattr(engine.module, info):
        return {}
    version = {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE
    }
    return {info: version}


def check_sharding(files: DeepSpeedFiles, zero_stage: int, world_size: int) -> None:
    """Check that the saved optimizer states are sharded in the same way as in this run.

    Args:
        files: files of the checkpoint.
        zero_stage: ZeRO stage of this run.
        world_size: number of ranks across which this run shards the optimizer states.

    Raises:
        CheckpointError: DeepSpeed cannot load the states.
    """
    if files.is_universal:
        return
    stage = 1 if zero_stage == 2 else zero_stage  # their files are the same
    if files.zero_stage != stage:
        problem = f"its optimizer was saved at ZeRO stage {files.zero_stage}, not {zero_stage}"
    elif stage > 0 and files.world_size != world_size:
        problem = f"its optimizer was saved by {files.world_size} ranks, not {world_size}"
    else:
        return
    raise CheckpointError(
        f"{files.directory} does not match this run: {problem}. Load the checkpoint with the "
        "PyTorch backend, convert it to a universal checkpoint with DeepSpeed's `ds_to_universal`, "
        "or pass `load_optimizer_states=False`."
    )


@contextlib.contextmanager
def keep_implementation(optimizer: Optimizer) -> Iterator[None]:
    """Inside this context, keep settings such as ``fused`` when a PyTorch optimizer loads a state.

    The state may come from another implementation of the optimizer. For example, the state of
    DeepSpeed's FusedAdam lacks these settings and stores step counts as integers. On exit, the step
    counts are converted to tensors.
    """
    before = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    try:
        yield
    finally:  # a load that fails may have changed the param groups
        if type(optimizer).__module__.startswith("torch.optim"):
            _repair(optimizer, before)


def _repair(optimizer: Optimizer, before: list[dict[str, Any]]) -> None:
    """Restore param-group settings such as ``fused``, and convert step counts to tensors.

    Args:
        optimizer: PyTorch optimizer that has loaded a state.
        before: settings of each param group before the load.
    """
    for group, settings in zip(optimizer.param_groups, before, strict=True):
        for name in group.keys() - settings.keys() - {"params"}:
            del group[name]
        for name, value in settings.items():
            if name in KEPT_SETTINGS or name not in group:
                group[name] = value
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if "step" in state:
            device = parameter.device if is_fused else None
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)


@contextlib.contextmanager
def _replace(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)

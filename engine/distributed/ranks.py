"""Which process this is among how many, and the process group where there are several."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed.environment import TIMEOUT

__all__ = ["Ranks", "agree", "connect", "disconnect", "process_rank", "world_size"]

_FAREWELL = timedelta(seconds=5)
_LETTING_GO = 0.05
_STARTERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
"""By what variable a starter of processes tells how many there are."""


@dataclass(frozen=True)
class Ranks:
    """This process's place: its rank among ``world_size``, its rank on its machine, its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    meeting: Any = None
    """The process group in which ranks wait for one another, but not for ever, as only gloo can;
    None: the default one."""


def world_size() -> int:
    """Return the number of ranks: the process group's, else the launcher's, else 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Return this process's rank: the process group's, else the launcher's, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK") or "0")


def connect(*, alone: bool = False, port: int | None = None) -> Ranks:
    """Join the process group that the launcher's environment describes, and return our place in it.

    One process needs no group, and makes none. A group that the script made already is used.

    Args:
        alone: whether one process is to have a group of its own, for libraries that want one.
        port: rank 0's, where the environment names none.

    Raises:
        ValueError: the environment names several ranks, but not which one this is.
    """
    size = world_size()
    _refuse_copies()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), local_rank, size, device, _meeting(size))
    if size == 1:
        if alone:
            store = dist.HashStore()  # type: ignore[attr-defined]  # torch's stubs leave it out
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
            atexit.register(disconnect)
        return Ranks(0, local_rank, 1, device)
    if port is not None:
        os.environ.setdefault("MASTER_PORT", str(port))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, so {' and '.join(missing)} must be set too, but "
            f"{'is' if len(missing) == 1 else 'are'} not. Start the script with `torchrun`."
        )
    patience = os.environ.get(TIMEOUT)
    timeout = timedelta(seconds=int(patience)) if patience else None
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    atexit.register(disconnect)
    return Ranks(dist.get_rank(), local_rank, size, device, _meeting(size))


def _meeting(size: int) -> Any:
    return None if size == 1 or dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def _refuse_copies() -> None:
    """Refuse to be one of several processes that all believe they are alone."""
    if "WORLD_SIZE" in os.environ or (dist.is_available() and dist.is_initialized()):
        return
    for name, starter in _STARTERS.items():
        tasks = int(os.environ.get(name) or "1")
        if tasks > 1:
            raise ValueError(
                f"WORLD_SIZE must be set where {starter} starts {tasks} tasks, but is not: each of "
                f"them would train alone, as rank 0 of 1. Have {starter} start one torchrun a "
                "node, as `onecycle launch` does."
            )


def agree(ranks: Ranks, config: str) -> None:
    """Prove that all ranks have one config; a run whose ranks differ hangs or goes astray.

    Raises:
        ValueError: another rank's is another one; the message has the lines that differ.
    """
    if ranks.world_size == 1:
        return
    all_of_them: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(all_of_them, config)
    for rank, other in enumerate(all_of_them):
        if other != all_of_them[0]:
            first, second = (
                json.dumps(json.loads(text), indent=1).splitlines()
                for text in (all_of_them[0], other)
            )
            lines = difflib.unified_diff(first, second, "rank 0", f"rank {rank}", n=0, lineterm="")
            raise ValueError(
                "the config must be the same on all ranks, but rank "
                f"{rank}'s is another one than rank 0's:\n" + "\n".join(lines)
            )


def disconnect() -> None:
    """Leave the process group together with the others, as far as they are still there.

    A rank that leaves first closes connections on which the others' threads still listen.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_backend() == "gloo":
        with contextlib.suppress(RuntimeError):
            dist.monitored_barrier(timeout=_FAREWELL)
    dist.destroy_process_group()
    # A thread of gloo that has yet to let go of its last tensor needs the interpreter for that, and
    # aborts the process where it has ended ("terminate called without an active exception").
    time.sleep(_LETTING_GO)

"""The rank of this process, its device, and the process group."""

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

__all__ = [
    "Ranks",
    "check_configs_match",
    "destroy_distributed",
    "init_distributed",
    "process_rank",
    "world_size",
]

_EXIT_TIMEOUT = timedelta(seconds=5)
_RELEASE_TIME = 0.05
_TASK_COUNTS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
"""Environment variables that hold the number of tasks, and the launcher that sets each one."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank, its rank on its host, the world size and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control_group: Any = None
    """Gloo group for barriers with a timeout, which NCCL lacks; None to use the default group."""


def world_size() -> int:
    """Return the world size of the process group, else the one that the launcher set, else 1."""
    if _has_process_group():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Return the rank in the process group, else the one that the launcher set, else 0."""
    if _has_process_group():
        return dist.get_rank()
    return int(os.environ.get("RANK") or "0")


def init_distributed(*, always_create_group: bool = False, port: int | None = None) -> Ranks:
    """Initialize the process group that the launcher's environment describes.

    An existing process group is reused. By default, a single process gets no process group.

    Args:
        always_create_group: whether a single process gets a process group too, for libraries that
            require one.
        port: port of rank 0, if the environment does not set `MASTER_PORT`.

    Raises:
        ValueError: if the environment describes several ranks but lacks the rank or the address.
    """
    size = world_size()
    _check_world_size_is_set()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not _has_process_group():
        backend = "nccl" if cuda else "gloo"
        if size > 1:
            _create_process_group(backend, size, port)
        elif always_create_group:
            store = dist.HashStore()  # type: ignore[attr-defined]  # torch's stubs leave it out
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            atexit.register(destroy_distributed)
        else:
            return Ranks(0, local_rank, 1, device)
    return Ranks(dist.get_rank(), local_rank, size, device, _create_control_group(size))


def _has_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _create_process_group(backend: str, size: int, port: int | None) -> None:
    if port is not None:
        os.environ.setdefault("MASTER_PORT", str(port))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set. Start the script with `torchrun`."
        )
    seconds = os.environ.get(TIMEOUT)
    dist.init_process_group(backend, timeout=timedelta(seconds=int(seconds)) if seconds else None)
    atexit.register(destroy_distributed)


def _create_control_group(size: int) -> Any:
    return None if size == 1 or dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def _check_world_size_is_set() -> None:
    """Reject a process that is one of several tasks but would train as rank 0 of 1."""
    if "WORLD_SIZE" in os.environ or _has_process_group():
        return
    for name, starter in _TASK_COUNTS.items():
        tasks = int(os.environ.get(name) or "1")
        if tasks > 1:
            raise ValueError(
                f"WORLD_SIZE is not set, but {starter} started {tasks} tasks: each of them would "
                f"train independently as rank 0 of 1. Let {starter} start one torchrun per node, "
                "as `onecycle launch` does."
            )


def check_configs_match(ranks: Ranks, config: str) -> None:
    """Check that all ranks have the same config; different configs can cause a hang.

    Args:
        ranks: this process's rank and world size.
        config: this rank's config, as JSON.

    Raises:
        ValueError: if a rank's config differs from that of rank 0; the message shows a diff.
    """
    if ranks.world_size == 1:
        return
    configs: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(configs, config)
    for rank, other in enumerate(configs):
        if other != configs[0]:
            first, second = (
                json.dumps(json.loads(text), indent=1).splitlines() for text in (configs[0], other)
            )
            lines = difflib.unified_diff(first, second, "rank 0", f"rank {rank}", n=0, lineterm="")
            raise ValueError(
                f"The config must be the same on all ranks, but rank {rank} has a different config "
                "than rank 0. Pass the same config on every rank. Difference:\n" + "\n".join(lines)
            )


def destroy_distributed() -> None:
    """Destroy the process group once all ranks that still run have reached this call.

    A rank that exits early would close connections that gloo threads of other ranks still use.
    """
    if not _has_process_group():
        return
    if dist.get_backend() == "gloo":
        with contextlib.suppress(RuntimeError):
            dist.monitored_barrier(timeout=_EXIT_TIMEOUT)
    dist.destroy_process_group()
    # A gloo thread may still hold a tensor, and needs the interpreter to release it. If the
    # interpreter has already exited, the process aborts ("terminate called without an active
    # exception").
    time.sleep(_RELEASE_TIME)

"""Initialize the process group, and get the rank, world size and device of this process."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import functools
import hashlib
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed.environment import TIMEOUT
from engine.distributed.tasks import read_task_variables

__all__ = [
    "Ranks",
    "check_configs_match",
    "destroy_distributed",
    "gather_if_different",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "read_timeout",
    "set_group_timeouts",
]

log = logging.getLogger("onecycle")

_EXIT_TIMEOUT = 5.0  # seconds
_EXIT_POLL = 0.01
_RELEASE_TIME = 0.05
_REPORT_TIME = 1.0  # seconds; a launcher polls the processes ten times as often
# Keys of the store. A single request reads the keys of all ranks.
_EXIT_COUNT = "onecycle/exit_count"
_EXITED_RANKS = "onecycle/exited_ranks"
_FAILED_RANKS = "onecycle/failed_ranks"


@dataclass(frozen=True)
class Ranks:
    """The rank, local rank, world size and device of this process."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control_group: Any = None
    """Gloo group for collective operations on CPU tensors, which NCCL does not support.

    If None, the default group is used.
    """
    shard: tuple[int, int] | None = None
    """Index of this rank's data shard, and the number of shards; None for one shard per rank."""

    @property
    def data_rank(self) -> int:
        """Zero-based index of the data shard that this rank loads."""
        return self.rank if self.shard is None else self.shard[0]

    @property
    def data_ranks(self) -> int:
        """Number of data shards.

        Ranks that share a model replica load the same shard.
        """
        return self.world_size if self.shard is None else self.shard[1]


def get_world_size() -> int:
    """Return the number of ranks in the run.

    Without an initialized process group, the number is read from the environment variable
    ``WORLD_SIZE`` or, if it is not set, from the variables of srun or mpirun. The default is 1.

    Raises:
        ValueError: if srun or mpirun started several tasks, but this task's rank or the address of
            rank 0 is unknown.
    """
    if _has_process_group():
        return dist.get_world_size()
    return int((read_task_variables(os.environ) or os.environ).get("WORLD_SIZE", "1"))


def get_rank() -> int:
    """Return the rank of this process.

    Without an initialized process group, the rank is read from the environment variable ``RANK``
    or, if ``RANK`` or ``WORLD_SIZE`` is not set, from the variables of srun or mpirun. The default
    is 0.

    Raises:
        ValueError: if srun or mpirun started several tasks, but this task's rank or the address of
            rank 0 is unknown.
    """
    if _has_process_group():
        return dist.get_rank()
    return int((read_task_variables(os.environ) or os.environ).get("RANK") or "0")


def init_distributed(
    *, always_create_group: bool = False, port: int | None = None, device: str = "auto"
) -> Ranks:
    """Initialize the process group from the environment variables that the launcher sets.

    If srun or mpirun started this process without torchrun, this function first sets the variables
    that torchrun would set.

    An existing process group is reused. By default, no process group is created for a single
    process.

    Args:
        always_create_group: whether to create a process group even for a single process. Some
            libraries require a process group.
        port: port of rank 0, used if `MASTER_PORT` is not set.
        device: "cuda", "cpu" or "auto". "auto" uses a GPU if PyTorch finds one, and otherwise the
            CPU.

    Returns:
        The rank, local rank, world size and device of this process.

    Raises:
        ValueError: if the GPU that ``device`` or ``LOCAL_RANK`` selects does not exist, or if a run
            with several ranks needs an environment variable, such as `MASTER_ADDR`, that is not set
            and cannot be derived from the variables of srun or mpirun.
    """
    if not _has_process_group():
        os.environ.update(read_task_variables(os.environ, port))
    size = get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.device("cpu")
    if _uses_gpu(device):
        local_rank = _find_gpu()
        own = torch.device("cuda", local_rank)
        torch.cuda.set_device(own)
    if size == 1 and not always_create_group and not _has_process_group():
        return Ranks(0, local_rank, 1, own)
    _delay_exit()
    if not _has_process_group():
        if size > 1:
            _create_process_group(own, size, port)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]  # torch's stubs leave it out
            _start_process_group(own, store=store, rank=0, world_size=1)
    return Ranks(dist.get_rank(), local_rank, size, own, _create_control_group(size))


def _uses_gpu(device: str) -> bool:
    is_available = torch.cuda.is_available()
    if device == "cuda" and not is_available:
        raise ValueError(
            '`engine.device` is "cuda", but PyTorch finds no GPU. Check that `nvidia-smi` lists a '
            "GPU, and run `onecycle doctor` to check that PyTorch is built with CUDA. To train on "
            "the CPU, remove `engine.device`."
        )
    return is_available and device != "cpu"


def _find_gpu() -> int:
    """Return the device index of this rank's GPU.

    The index is the first of these that applies:

    - ``LOCAL_RANK``, if it is set
    - 0, if no process group exists
    - the index of the device bound to the process group, if any
    - the index of the current CUDA device, if CUDA is initialized
    - the rank modulo the number of GPUs, as in torch's ``DeviceMesh``

    Raises:
        ValueError: if the GPU does not exist.
    """
    count = torch.cuda.device_count()
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None and _has_process_group():
        bound = dist.distributed_c10d._get_default_group().bound_device_id  # noqa: SLF001  # private in torch
        if bound is not None:
            return int(bound.index)
        is_chosen = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # untyped in torch
        return torch.cuda.current_device() if is_chosen else dist.get_rank() % count
    index = int(local_rank or "0")
    if index >= count:
        fix = "Set LOCAL_RANK=0 in each task, or start" if count == 1 else "Start"
        raise ValueError(
            f"LOCAL_RANK is {index}, but this process can use only {count} "
            f"GPU{'s' if count > 1 else ''}. {fix} at most one process per GPU on each host."
        )
    return index


@functools.cache
def _delay_exit() -> None:
    """Register a short wait at exit, once per process.

    A gloo thread that holds a tensor can release the tensor only while the interpreter is running.
    If the interpreter has already exited, the process aborts ("terminate called without an active
    exception"). The wait is needed even if the script itself created the process group or has
    already destroyed the group.
    """
    atexit.register(time.sleep, _RELEASE_TIME)


def _has_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _start_process_group(device: torch.device, **settings: Any) -> None:
    """Create the default process group with NCCL for GPUs or gloo for CPUs."""
    if device.type == "cuda":
        settings["device_id"] = device  # NCCL would otherwise guess the GPU from the rank
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=read_timeout(), **settings)
    atexit.register(destroy_distributed)
    # At exit, PyTorch imports tabulate if it is installed. Such a late import would make Python
    # forget that KeyboardInterrupt ended the process, and exit with status 1 instead of 130.
    with contextlib.suppress(ImportError):
        importlib.import_module("tabulate")


def read_timeout() -> timedelta | None:
    """Read the timeout for collectives from ``ONECYCLE_TIMEOUT``; return None if it is not set."""
    seconds = os.environ.get(TIMEOUT)
    return timedelta(seconds=int(seconds)) if seconds else None


def set_group_timeouts() -> None:
    """Set the timeout of all existing process groups to ``ONECYCLE_TIMEOUT``, if it is set.

    PyTorch does not apply the timeout of the default group to groups that other libraries create.
    """
    timeout = read_timeout()
    if timeout is None:
        return
    for group in list(dist.distributed_c10d._world.pg_map):  # noqa: SLF001  # private in torch
        if dist.get_rank(group) >= 0:
            dist.distributed_c10d._set_pg_timeout(timeout, group)  # noqa: SLF001  # private in torch


def _create_process_group(device: torch.device, size: int, port: int | None) -> None:
    if port is not None:
        os.environ.setdefault("MASTER_PORT", str(port))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set. Start the script with `torchrun`."
        )
    _start_process_group(device)


def _create_control_group(size: int) -> Any:
    # The name of a group with several backends, such as "cpu:gloo,cuda:nccl", differs from both.
    if size == 1 or dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo", timeout=read_timeout())


def check_configs_match(ranks: Ranks, config: str) -> None:
    """Check that all ranks have the same config. Different configs can cause a deadlock.

    Args:
        ranks: rank and world size of this process.
        config: config of this rank, as JSON.

    Raises:
        ValueError: if a rank has a different config than rank 0. The message contains a diff of
            the two configs.
    """
    configs = gather_if_different(ranks, config)
    for rank, other in enumerate(configs):
        if other != configs[0]:
            first, second = (
                json.dumps(json.loads(text), indent=1).splitlines() for text in (configs[0], other)
            )
            lines = difflib.unified_diff(first, second, "rank 0", f"rank {rank}", n=0, lineterm="")
            raise ValueError(
                f"Rank {rank} has a different config than rank 0. Pass the same config on every "
                "rank. Difference:\n" + "\n".join(lines)
            )


def gather_if_different(ranks: Ranks, value: Any) -> list[Any]:
    """Return the values of all ranks if they differ, or an empty list if they are equal.

    The ranks compare hashes with one all-reduce of 512 bytes, and gather the values only if the
    hashes differ. The cost for equal values does not grow with the world size. Every rank must call
    this function.

    Args:
        ranks: rank and world size of this process.
        value: value of this rank; equal values must have the same `repr`.
    """
    if ranks.world_size == 1:
        return []
    digest = torch.tensor(list(hashlib.sha256(repr(value).encode()).digest()), device="cpu")
    highest = torch.cat([digest, -digest])
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=ranks.control_group)
    most, least = highest.numpy().reshape(2, -1)  # in host memory: no device is involved
    if (most == -least).all():
        return []
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=ranks.control_group)
    return values


def destroy_distributed() -> None:
    """Destroy the process group.

    With gloo, first wait up to 5 seconds for all ranks to call this function. Without the wait, a
    rank that exits early would close connections that gloo threads of other ranks still use.

    The process group is not destroyed if this process exits because of an exception or, with gloo,
    if some ranks are still training after the wait. The connections of the group then stay open
    until this process exits. Closing them earlier could make other ranks fail first, and the
    launcher would then report the wrong rank. With NCCL, destroying the group could also block,
    because NCCL waits for collectives that other ranks may never join.

    If this process exits because of an exception, this function logs the ranks that are the likely
    cause: ranks that exited earlier without an exception, or ranks that did not join the collective
    operation that failed.
    """
    if not _has_process_group():
        return
    is_gloo = "gloo" in dist.get_backend()
    if hasattr(sys, "last_value"):
        _log_missing_ranks(sys.last_value)
        others_train = True
    else:
        _announce_exit()
        others_train = is_gloo and not _wait_for_exit_of_all_ranks()
    if not others_train:
        dist.destroy_process_group()


# The ranks use the store: a rank that is in another collective operation would not answer a
# barrier. The store raises RuntimeError if the rank that hosts it has exited.


def _get_store() -> Any:
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001  # private in torch


def _announce_exit() -> None:
    with contextlib.suppress(RuntimeError):
        store = _get_store()
        store.add(_EXIT_COUNT, 1)
        store.append(_EXITED_RANKS, f"{dist.get_rank()} ")


def _log_missing_ranks(error: BaseException | None) -> None:
    """Log the ranks that this rank may have been waiting for when it failed.

    If any ranks had already exited, log them. Otherwise, if a collective operation failed and this
    rank was the first to fail, log the ranks that have not failed. They cannot have joined the
    operation, because it fails on every rank that joins it.

    Args:
        error: exception that makes this process exit.
    """
    with contextlib.suppress(RuntimeError):
        store, rank = _get_store(), dist.get_rank()
        store.append(_FAILED_RANKS, f"{rank} ")
        ended = _read_ranks(store, _EXITED_RANKS)
        if ended:
            log.error(
                "%s had already exited when this rank failed. All ranks must take the same number "
                "of steps. Check that each rank has the same number of batches.",
                _list_ranks(ended),
            )
            # The launcher should receive the exit status of earlier failed ranks first.
            time.sleep(_REPORT_TIME)
        elif _is_communication_error(error):
            time.sleep(_REPORT_TIME)  # the other ranks that joined the operation fail meanwhile
            failed = _read_ranks(store, _FAILED_RANKS)
            missing = set(range(dist.get_world_size())).difference(failed)
            if missing and failed[0] == rank:
                log.error(
                    "%s did not join the collective operation that failed. Check for a process "
                    "that hangs, was killed (for example because memory ran out) or has exited "
                    "without an error. If a rank only needs more time, for example to load data, "
                    "set %s to a higher number of seconds.",
                    _list_ranks(missing),
                    TIMEOUT,
                )


def _read_ranks(store: Any, key: str) -> list[int]:
    return [int(rank) for rank in store.get(key).split()] if store.check([key]) else []


def _list_ranks(ranks: Collection[int]) -> str:
    return f"Rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _is_communication_error(error: BaseException | None) -> bool:
    """Return whether an exception or any of its causes comes from a collective operation."""
    while error is not None:
        # Gloo raises RuntimeError with its source file in the message.
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _wait_for_exit_of_all_ranks() -> bool:
    """Wait up to 5 seconds for all ranks to announce their exit, and return whether all did.

    If the rank that hosts the store of the process group has already exited, return True
    immediately.
    """
    deadline = time.monotonic() + _EXIT_TIMEOUT
    with contextlib.suppress(RuntimeError):
        store = _get_store()
        while store.add(_EXIT_COUNT, 0) < dist.get_world_size():
            if time.monotonic() > deadline:
                return False
            time.sleep(_EXIT_POLL)
    return True

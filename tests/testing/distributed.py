"""Run a test function on several ranks.

Each rank is a new process, forked from a server that has already imported torch and DeepSpeed.
A rank therefore starts in milliseconds, and does not depend on earlier tests.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

__all__ = ["RankError", "child_pids", "run_distributed_test", "server_pids"]

IMPORTED_BY_SERVER = [
    "pytest",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "safetensors.torch",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch's compiler
    "setuptools",  # DeepSpeed imports it to find its compiled operators
    "engine.initialization",
    "engine.backends.fsdp",
    "engine.backends.deepspeed",
]
FAILURE_GRACE = 5.0  # seconds that the other ranks may continue after one rank failed
OUTPUT_TAIL = 6000  # number of characters of a rank's output in a failure report

server_pids: set[int] = set()
"""Processes that live until the session ends: the fork server and multiprocessing's tracker."""


class RankError(Exception):
    """The traceback and output of the ranks that failed."""


class Outcome(NamedTuple):
    """The result of one rank: the returned value, or the exception with its traceback."""

    value: Any = None
    error: BaseException | None = None
    traceback: str = ""


def run_distributed_test(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call ``function(*args)`` on every rank, and return the results in rank order.

    Each call gives its ranks torchrun's environment variables and a new store, so the function can
    call `engine.initialize` or ``dist.init_process_group("gloo")``. The ranks inherit all other
    environment variables and the working directory from the test.

    Args:
        function: function at the top level of a module.
        world_size: number of ranks; 1 runs a single process.
        args: arguments that can be pickled, the same for all ranks.
        timeout: seconds after which ranks that still run are killed.

    Raises:
        TimeoutError: a rank did not end in time; the message contains its stack.
        RankError: a rank died, or raised an exception that cannot be pickled.
        BaseException: the exception of the first rank that failed, with a `RankError` as its cause.
    """
    import torch.distributed as dist

    _start_server()
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as directory:
        ranks = []
        for rank in range(world_size):
            environment = os.environ | torchrun_variables(rank, world_size, store.port)
            files = Path(directory, f"{rank}.pickle"), Path(directory, f"{rank}.out")
            process = context.Process(target=_run_rank, args=(function, args, environment, *files))
            process.start()
            ranks.append(process)
        try:
            failed, hung = _wait(ranks, timeout)
        finally:
            _kill(ranks)
        outcomes = [_read_outcome(Path(directory, f"{rank}.pickle")) for rank in range(world_size)]
        if failed or hung:
            report = "\n".join(
                f"rank {rank} {_describe_state(ranks[rank], outcomes[rank], rank in hung)}\n"
                + _read_tail(Path(directory, f"{rank}.out"))
                for rank in failed + hung
            )
            if not failed:
                names = " and ".join(map(str, hung))
                raise TimeoutError(f"rank {names} did not end within {timeout:g} s\n{report}")
            first = outcomes[failed[0]]
            if first is not None and first.error is not None:
                raise first.error from RankError(report)
            raise RankError(report)
    return [outcome.value for outcome in outcomes if outcome is not None]


def torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a rank on a single node."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {name: str(value) for name, value in values.items()}


def child_pids() -> set[int]:
    """Return the process ids of this process's children; an empty set without ``/proc``."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # the thread has ended
            found.update(map(int, path.read_text().split()))
    return found


def _start_server() -> None:
    """Start the fork server if it is not running, and wait until it has imported all packages."""
    before = child_pids()
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        forkserver.set_forkserver_preload(IMPORTED_BY_SERVER)
        forkserver.ensure_running()
        resource_tracker.ensure_running()
    started = child_pids() - before
    server_pids.update(started)
    if started:
        first = multiprocessing.get_context("forkserver").Process(target=int)
        first.start()
        first.join()


def _wait(ranks: list[BaseProcess], timeout: float) -> tuple[list[int], list[int]]:
    """Wait for all ranks. Return the failed ranks, first failure first, and the running ranks."""
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    failed: list[int] = []
    deadline = time.monotonic() + timeout
    while running:
        ended = connection.wait(list(running), timeout=max(deadline - time.monotonic(), 0))
        if not ended:
            break
        for rank in sorted(running.pop(sentinel) for sentinel in ended):  # type: ignore[call-overload]
            ranks[rank].join()
            if ranks[rank].exitcode:
                failed.append(rank)
                deadline = min(deadline, time.monotonic() + FAILURE_GRACE)
    return failed, sorted(running.values())


def _kill(ranks: list[BaseProcess]) -> None:
    """Kill the ranks that still run, after faulthandler has written their stacks."""
    for step in (signal.SIGABRT, signal.SIGKILL):
        for process in ranks:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, step)
        for process in ranks:
            process.join(timeout=FAILURE_GRACE)


def _read_outcome(path: Path) -> Outcome | None:
    return pickle.loads(path.read_bytes()) if path.exists() else None  # written by `_run_rank`


def _describe_state(process: BaseProcess, outcome: Outcome | None, is_hung: bool) -> str:
    if is_hung:
        return "was still running, with this stack (last lines of its output):"
    if outcome is None:
        return f"died with exit code {process.exitcode}:"
    return f"failed:\n{outcome.traceback}"


def _read_tail(path: Path) -> str:
    return path.read_text(errors="replace")[-OUTPUT_TAIL:] if path.exists() else ""


def _run_rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environment: Mapping[str, str],
    result: Path,
    output: Path,
) -> None:
    """Call the function in a rank's process and write its outcome to a file."""
    import torch

    from engine.distributed.ranks import destroy_distributed

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable(file)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        outcome = Outcome(function(*args))
        destroy_distributed()
    except BaseException as error:  # noqa: BLE001  # the test raises it
        outcome = Outcome(error=_check_picklable(error), traceback=traceback.format_exc())
    is_failed = bool(outcome.traceback)
    partial = result.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(is_failed))  # threads of a failed rank may wait for other ranks indefinitely


def _check_picklable(error: BaseException) -> BaseException | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # pickling runs the exception's own code
        return None

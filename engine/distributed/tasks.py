"""Determine a process's rank from the environment variables that srun or mpirun sets.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["read_task_variables"]

_DEFAULT_PORT = 29500  # DeepSpeed's


class _Starter(NamedTuple):
    """Names of a task launcher, such as srun, and of the environment variables that it sets."""

    name: str
    size: str
    rank: str
    local_rank: str
    local_size: str = ""


# Some implementations of mpirun use srun to start one process per host. This process then starts
# the tasks. The environment variables of srun do not describe these tasks, so srun is last.
_STARTERS = (
    _Starter(
        "mpirun",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Starter("mpirun", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Starter("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)


def read_task_variables(environment: Mapping[str, str], port: int | None = None) -> dict[str, str]:
    """Return the environment variables that torchrun would set for a task of srun or mpirun.

    Args:
        environment: environment variables of this process.
        port: value of ``MASTER_PORT`` if the environment does not set it; None to choose a port.

    Returns:
        Values of ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``. The
        dict is empty if there is only one task, if ``RANK`` and ``WORLD_SIZE`` are already set, or
        if ``WORLD_SIZE`` is set to a value other than the number of tasks.

    Raises:
        ValueError: srun or mpirun started several tasks, but a value is unknown, or the task is an
            interactive shell (``srun --pty``).

    >>> names = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
    >>> values = dict(zip((f"OMPI_COMM_WORLD_{name}" for name in names), "2112", strict=True))
    >>> read_task_variables(values)  # doctest: +NORMALIZE_WHITESPACE
    {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1', 'MASTER_ADDR': '127.0.0.1',
     'MASTER_PORT': '29500'}
    """
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        return {}
    known = [s for s in _STARTERS if all(environment.get(name) for name in s[1:4])]
    incomplete = [s for s in _STARTERS if environment.get(s.size, "1") not in ("", "1")]
    starter = next(iter(known or incomplete), None)
    size = environment[starter.size] if starter else "1"
    if starter is None or size == "1" or environment.get("WORLD_SIZE", size) != size:
        return {}
    # With `srun --pty bash`, only the first task has a terminal and reaches this line.
    if starter not in known or "SLURM_PTY_PORT" in environment:
        raise ValueError(
            f"{starter.name} started {size} tasks, but RANK and WORLD_SIZE are not set, so each "
            f"task would train independently as rank 0. Use {starter.name} to start one torchrun "
            "per node, or use `onecycle launch`. To train in this task only, set WORLD_SIZE to 1."
        )
    address = environment.get("MASTER_ADDR") or _find_address(starter, environment)
    if not address:
        raise ValueError(
            f"MASTER_ADDR is not set, but {starter.name} started {size} tasks on several hosts. "
            "Set MASTER_ADDR to the address of rank 0's host, for example with `export MASTER_ADDR="
            '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)`.'
        )
    # If each Slurm task has access to only one GPU, the GPU has index 0 in every task.
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    has_own_gpu = visible and "," not in visible
    return {
        "RANK": environment[starter.rank],
        "WORLD_SIZE": size,
        "LOCAL_RANK": "0" if has_own_gpu else environment[starter.local_rank],
        "MASTER_ADDR": address,
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port or _choose_port(environment)),
    }


def _find_address(starter: _Starter, environment: Mapping[str, str]) -> str | None:
    """Return the loopback address if all tasks run on this host; otherwise, return None."""
    if starter.local_size:
        is_one_host = environment.get(starter.local_size) == environment[starter.size]
    else:
        is_one_host = environment.get("SLURM_STEP_NUM_NODES") == "1"
    return "127.0.0.1" if is_one_host else None


def _choose_port(environment: Mapping[str, str]) -> int:
    """Return a port number that is the same in all tasks of a job step.

    In Slurm, the port is derived from the IDs of the job and the step, so that the steps of a job
    use different ports.
    """
    job, step = (environment.get(f"SLURM_{kind}_ID", "") for kind in ("JOB", "STEP"))
    if job.isdecimal() and step.isdecimal():
        return 20000 + (int(job) + 101 * int(step)) % 10000
    return _DEFAULT_PORT

"""Launch a job on Slurm with a self-contained sbatch script."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from typing import NoReturn

from engine.distributed.environment import FAILURE_FILE, SAVED_AND_ENDED, to_exit_status
from engine.errors import LaunchError
from engine.launch.plan import build_environment, format_assignments
from engine.launch.request import LaunchRequest

__all__ = ["build_sbatch", "count_gpus", "is_in_allocation", "run_in_allocation", "submit"]

_TEMPLATE = """\
#!/bin/bash
{options}
# One torchrun per node. $SLURM_NODEID is set only inside a task, so the srun command is quoted.
set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST_ADDRESS=$(getent ahostsv4 "$first" | awk 'NR == 1 {{ print $1 }}')
export RDZV_PORT={port}
{exports}
cd {cwd} || exit 1
export {failure}="$PWD/.onecycle-$SLURM_JOB_ID"
rm -f "${failure}"

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
  address=$(getent ahostsv4 "$SLURMD_NODENAME" | awk "NR == 1 {{ print \\$1 }}")
  [ "$SLURM_NODEID" = 0 ] && is_host=true || is_host=false
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[$SLURMD_NODENAME:r\\${{rank}}] "
  exec "$0" -m onecycle.isolated engine.launch.torchrun \\
    --nnodes {nodes} --nproc-per-node {nproc} --max-restarts {restarts} --tee 3 \\
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$FIRST_ADDRESS:$RDZV_PORT" \\
    --rdzv-conf "is_host=$is_host,join_timeout={timeout}" --local-addr "$address" "$@"
' {command}
status=$?
# srun returns the highest exit status of all tasks. Return the status of the first failed rank.
if [ "$status" -ne 0 ] && [ -s "${failure}" ]; then
  status=$(sort -s -n -k 1,1 "${failure}" | awk 'NR == 1 {{ print $2 }}')
fi
rm -f "${failure}"
{requeue}exit $status
"""

_OPTION_NAME = re.compile(r"[a-z][a-z0-9-]*")
_TERMINATED = to_exit_status(-signal.SIGTERM)
_REQUEUE = f"""\
# If SIGTERM or SIGUSR1 ended the job, requeue it, so that it resumes later.
case $status in {SAVED_AND_ENDED}|{_TERMINATED}) scontrol requeue "$SLURM_JOB_ID" ;; esac
"""


def build_sbatch(
    request: LaunchRequest, options: Mapping[str, str], *, hide_secrets: bool = False
) -> str:
    """Return the text of an sbatch script that launches a job.

    Args:
        request: description of the job. Its host names are ignored, because Slurm chooses the
            hosts.
        options: ``#SBATCH`` options as a mapping from long name to value (empty for a flag). The
            options override the defaults. With the option ``requeue``, the job is requeued if
            SIGTERM or SIGUSR1 terminates the job, for example on preemption.
        hide_secrets: whether to omit the values of environment variables whose names suggest a
            secret. The script then uses the values from the environment in which sbatch runs.

    Raises:
        LaunchError: if the name of an option is invalid, or its value has more than one line.
    """
    defaults = {
        "job-name": "onecycle",
        "nodes": str(len(request.hosts)),
        "ntasks-per-node": "1",
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{max(60, request.grace)}",
    }
    lines = [_format_option(*option) for option in (defaults | dict(options)).items()]
    nodes = '"$SLURM_JOB_NUM_NODES"'
    if request.min_nodes:
        nodes = f'"{request.min_nodes}:$SLURM_JOB_NUM_NODES"'
    return _TEMPLATE.format(
        options="\n".join(lines),
        port=request.port or "$((20000 + SLURM_JOB_ID % 20000))",
        exports=_build_exports(request, hide_secrets=hide_secrets),
        failure=FAILURE_FILE,
        cwd=shlex.quote(request.cwd),
        nproc=request.hosts[0].size,
        nodes=nodes,
        restarts=request.max_restarts,
        timeout=request.rendezvous_timeout,
        command=shlex.join([request.python, *_build_flags(request), *request.script]),
        requeue=_REQUEUE if "requeue" in options else "",
    )


def count_gpus(options: Mapping[str, str]) -> int | None:
    """Return the number of GPUs per node that ``#SBATCH`` options request; None if unknown.

    The result is 0 if the options do not request GPUs.

    >>> count_gpus({"gpus-per-node": "a100:4"}), count_gpus({"gres": "gpu:2"}), count_gpus({})
    (4, 2, 0)
    """
    requests = [value for name, value in options.items() if name.startswith("gpus")]
    requests += [each for each in options.get("gres", "").split(",") if each.startswith("gpu")]
    if not requests:
        return 0
    per_node = [each for each in requests if each not in {options.get("gpus"), ""}]
    found = re.search(r"(?:^|:)(\d+)$", per_node[0]) if per_node else None
    return int(found[1]) if found else None


def _format_option(name: str, value: str) -> str:
    # A line break would end the comment, so that bash would run the rest of the value.
    if not _OPTION_NAME.fullmatch(name) or not value.isprintable():
        raise LaunchError(
            f"`--slurm-opt` must be one line of the form NAME=VALUE, got {f'{name}={value}'!r}. "
            "NAME is the long name of an sbatch option. For example, pass `--slurm-opt "
            "partition=gpu`."
        )
    return f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"


def _build_exports(request: LaunchRequest, *, hide_secrets: bool) -> str:
    interfaces = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if request.interface else ()
    exports = {
        **build_environment(request, request.hosts[0].size),
        **dict.fromkeys(interfaces, str(request.interface)),
        **request.env,
    }
    assignments = format_assignments(exports, hide_secrets=hide_secrets)
    return "\n".join(f"export {assignment}" for assignment in assignments)


def _build_flags(request: LaunchRequest) -> list[str]:
    log_dir = ["--log-dir", request.log_dir] if request.log_dir else []
    return [
        *log_dir,
        *["--module"] * request.is_module,
        *["--no-python"] * request.is_command,
    ]


def is_in_allocation() -> bool:
    """Return whether this process runs in a Slurm allocation and was not started by srun."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ


def run_in_allocation(script: str, nodes: int, options: Mapping[str, str]) -> NoReturn:
    """Run an sbatch script in the current allocation. The script replaces this process.

    Args:
        script: text of the script.
        nodes: number of nodes that the launch requires.
        options: ``#SBATCH`` options; must be empty, because the allocation already exists.

    Raises:
        LaunchError: if the allocation has a different number of nodes, or ``options`` is not empty.
    """
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", nodes))
    if nodes != allocated:
        raise LaunchError(
            f"`--nnodes` must be the number of nodes in this allocation ({allocated}), got "
            f"{nodes}. Pass `--nnodes {allocated}`."
        )
    if options:
        raise LaunchError(
            "`--slurm-opt` has no effect in an existing allocation. Pass the options to `salloc` "
            "or `sbatch` instead."
        )
    # Every user of this host can read the arguments of a process, so pass the script, which may
    # contain secrets, as a file. Replace this process, so that signals reach srun directly.
    file = os.memfd_create("onecycle-launch", 0)
    with open(file, "w", encoding="utf-8", closefd=False) as memory:
        memory.write(script)
    os.execvp("bash", ["bash", f"/dev/fd/{file}"])  # noqa: S606, S607  # our own script


def submit(script: str) -> tuple[bool, str]:
    """Submit an sbatch script. Return whether sbatch succeeded, and its output.

    Raises:
        LaunchError: if sbatch is not installed.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise LaunchError(
            "sbatch is not installed on this host. Run this command on a Slurm login node, or "
            "write the script to a file with `--write-sbatch`."
        )
    done = subprocess.run(  # noqa: S603  # sbatch is Slurm's command
        [sbatch], input=script, text=True, capture_output=True, check=False
    )
    return done.returncode == 0, (done.stdout + done.stderr).strip()

"""Launch a script as a Slurm job, with a self-contained sbatch script."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from typing import NoReturn

from engine.distributed.environment import FAILURE_FILE, SAVED_AND_ENDED, to_exit_status
from engine.errors import LaunchError
from engine.launch.plan import build_environment
from engine.launch.request import LaunchRequest

__all__ = ["build_sbatch", "is_in_allocation", "run_in_allocation", "submit"]

_TEMPLATE = """\
#!/bin/bash
{options}
# One torchrun per node. $SLURM_NODEID is set only inside a task, so the srun command is quoted.
set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST_ADDRESS=$(getent ahostsv4 "$first" | awk 'NR == 1 {{ print $1 }}')
export RDZV_PORT=$((20000 + SLURM_JOB_ID % 20000))
{exports}
cd {cwd} || exit 1
export {failure}="$PWD/.onecycle-$SLURM_JOB_ID"
rm -f "${failure}"

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
  address=$(getent ahostsv4 "$SLURMD_NODENAME" | awk "NR == 1 {{ print \\$1 }}")
  [ "$SLURM_NODEID" = 0 ] && is_host=true || is_host=false
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[$SLURMD_NODENAME:r\\${{rank}}] "
  exec "$0" -m onecycle.isolated engine.launch.torchrun \\
    --nnodes {nodes} --nproc-per-node {nproc} --max-restarts {restarts} --tee 3 {flags}\\
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$FIRST_ADDRESS:$RDZV_PORT" \\
    --rdzv-conf "is_host=$is_host,join_timeout={timeout}" --local-addr "$address" "$@"
' {command}
status=$?
# srun returns the highest exit status, even of killed tasks. Return that of the first failed rank.
if [ "$status" -ne 0 ] && [ -s "${failure}" ]; then
  status=$(sort -s -n -k 1,1 "${failure}" | awk 'NR == 1 {{ print $2 }}')
fi
rm -f "${failure}"
{requeue}exit $status
"""

_TERMINATED = to_exit_status(-signal.SIGTERM)
_REQUEUE = f"""\
# The job received a signal and saved a checkpoint. Requeue it, so that it resumes later.
case $status in {SAVED_AND_ENDED}|{_TERMINATED}) scontrol requeue "$SLURM_JOB_ID" ;; esac
"""


def build_sbatch(request: LaunchRequest, options: Mapping[str, str]) -> str:
    """Return the text of an sbatch script that launches the job.

    Args:
        request: launch request. Its host names are ignored, because Slurm chooses the hosts.
        options: maps the long name of each ``#SBATCH`` option to its value; empty for a flag. These
            options override the defaults. With ``requeue``, a job that ends because of a signal,
            for example when it is preempted, is requeued.
    """
    defaults = {
        "job-name": "onecycle",
        "nodes": str(len(request.hosts)),
        "ntasks-per-node": "1",
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{max(60, request.grace)}",
    }
    lines = [
        f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"
        for name, value in (defaults | dict(options)).items()
    ]
    nodes = '"$SLURM_JOB_NUM_NODES"'
    if request.min_nodes:
        nodes = f'"{request.min_nodes}:$SLURM_JOB_NUM_NODES"'
    return _TEMPLATE.format(
        options="\n".join(lines),
        exports=_build_exports(request),
        failure=FAILURE_FILE,
        cwd=shlex.quote(request.cwd),
        nproc=request.hosts[0].size,
        nodes=nodes,
        flags=_build_flags(request),
        restarts=request.max_restarts,
        timeout=request.rendezvous_timeout,
        command=shlex.join([request.python, *request.script]),
        requeue=_REQUEUE if "requeue" in options else "",
    )


def _build_exports(request: LaunchRequest) -> str:
    interfaces = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if request.interface else ()
    exports = {
        **build_environment(request, request.hosts[0].size),
        **dict.fromkeys(interfaces, str(request.interface)),
        **request.env,
    }
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in exports.items())


def _build_flags(request: LaunchRequest) -> str:
    flags = ["--module"] * request.is_module + ["--no-python"] * request.is_command
    if request.log_dir:
        flags += ["--log-dir", f'"{request.log_dir}"']
    return "".join(f"{flag} " for flag in flags)


def is_in_allocation() -> bool:
    """Return whether this process runs in a Slurm allocation and was not started by srun."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ


def run_in_allocation(script: str, nodes: int, options: Mapping[str, str]) -> NoReturn:
    """Run an sbatch script in the current allocation. This process is replaced by bash.

    Args:
        script: text of the script.
        nodes: number of nodes that the launch requires.
        options: ``#SBATCH`` options; must be empty, because the allocation already exists.

    Raises:
        LaunchError: if the allocation has a different number of nodes, or options are given.
    """
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", nodes))
    if nodes != allocated:
        raise LaunchError(
            f"`--nnodes` must be {allocated}, the number of nodes in this allocation, got {nodes}."
        )
    if options:
        raise LaunchError(
            "`--slurm-opt` has no effect in an existing allocation. Pass the options to `salloc` "
            "or `sbatch` instead."
        )
    # Replace this process, so that signals reach srun directly.
    os.execvp("bash", ["bash", "-c", script])  # noqa: S606, S607  # our own script


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

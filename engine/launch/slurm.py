"""A launch as one Slurm job: a script that needs nothing beside it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from engine.launch.plan import Wanted, environment_of

__all__ = ["sbatch_of"]

_TEMPLATE = """\
#!/bin/bash
{options}
# One torchrun a node; $SLURM_NODEID is known inside of a task only, so the last part is quoted.
set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST_ADDRESS=$(getent ahostsv4 "$first" | awk 'NR == 1 {{ print $1 }}')
export RDZV_PORT=$((20000 + SLURM_JOB_ID % 20000))
{exports}
cd {cwd} || exit 1
export ONECYCLE_FAILURE="$PWD/.onecycle-$SLURM_JOB_ID"
rm -f "$ONECYCLE_FAILURE"

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
  address=$(getent ahostsv4 "$SLURMD_NODENAME" | awk "NR == 1 {{ print \\$1 }}")
  [ "$SLURM_NODEID" = 0 ] && is_host=true || is_host=false
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[$SLURMD_NODENAME:r\\${{rank}}] "
  exec "$0" -m engine.launch.torchrun \\
    --nnodes {nodes} --nproc-per-node {nproc} --max-restarts {restarts} --tee 3 {flags}\\
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$FIRST_ADDRESS:$RDZV_PORT" \\
    --rdzv-conf "is_host=$is_host,join_timeout={timeout}" --local-addr "$address" "$@"
' {command}
status=$?
# srun ends with the highest status, be it of a task that it has killed; the first is the cause.
if [ "$status" -ne 0 ] && [ -s "$ONECYCLE_FAILURE" ]; then
  status=$(sort -s -n -k 1,1 "$ONECYCLE_FAILURE" | awk 'NR == 1 {{ print $2 }}')
fi
rm -f "$ONECYCLE_FAILURE"
{requeue}exit $status
"""

_REQUEUE = """\
# It was told to end and has saved: go on from there when there is room again.
case $status in 75|143) scontrol requeue "$SLURM_JOB_ID" ;; esac
"""


def sbatch_of(wanted: Wanted, options: Mapping[str, str]) -> str:
    """Return the text of an sbatch file.

    Args:
        wanted: what to run on how many hosts; they are Slurm's to choose.
        options: of ``#SBATCH``, by their long names; they win over the usual ones. ``requeue`` has
            the job saved and queued again when it is preempted.
    """
    chosen = {
        "job-name": "onecycle",
        "nodes": str(len(wanted.hosts)),
        "ntasks-per-node": "1",
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{max(60, wanted.grace)}",
        **options,
    }
    lines = [
        f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"
        for name, value in chosen.items()
    ]
    flags = ["--module"] * wanted.is_module + ["--no-python"] * wanted.is_command
    if wanted.log_dir:
        flags += ["--log-dir", f'"{wanted.log_dir}"']
    interfaces = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if wanted.interface else ()
    exports = {
        **environment_of(wanted, wanted.hosts[0].size),
        **dict.fromkeys(interfaces, str(wanted.interface)),
        **wanted.env,
    }
    return _TEMPLATE.format(
        options="\n".join(lines),
        exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        cwd=shlex.quote(wanted.cwd),
        nproc=wanted.hosts[0].size,
        nodes=f'"{wanted.least_nodes}:$SLURM_JOB_NUM_NODES"'
        if wanted.least_nodes
        else '"$SLURM_JOB_NUM_NODES"',
        flags="".join(f"{flag} " for flag in flags),
        restarts=wanted.max_restarts,
        timeout=wanted.rendezvous_timeout,
        command=shlex.join([wanted.python, *wanted.script]),
        requeue=_REQUEUE if "requeue" in options else "",
    )

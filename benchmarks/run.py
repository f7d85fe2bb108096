"""Run the benchmarks of a group, and print how long each takes.

    python benchmarks/run.py speed       # same as `make bench`
    python benchmarks/run.py evidence    # same as `make evidence`

The group "speed" runs one benchmark at a time. The group "evidence" trains models on one CPU core
per benchmark, and writes the results to the directory ``run/evidence``. You can compare them with
the published results in docs/results. If this group is interrupted, run it again: it continues with
the first training run whose results are missing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
OUTPUT = Path("run") / "evidence"

GROUPS = {
    "speed": (
        "python benchmarks/validate_cost.py --rounds 9",
        "python benchmarks/start_up.py --rounds 3",
        "python benchmarks/scheduler_speed.py --rounds 9",
        "python benchmarks/training_speed.py --rounds 5",
        "torchrun --standalone --nproc_per_node 2 benchmarks/training_speed_ranks.py",
        "python benchmarks/checkpoint_speed.py --rounds 3",
        "torchrun --standalone --nproc_per_node 2 benchmarks/checkpoint_ranks.py",
        "python benchmarks/autowu_decision.py --rounds 100",
        "python benchmarks/growth.py --steps 20000 --largest 1e7",
    ),
    "evidence": (
        f"python benchmarks/evidence/autowu_large_batch.py --output {OUTPUT}",
        f"python benchmarks/evidence/lr_scheduling_chapter.py --output {OUTPUT}",
        f"python benchmarks/evidence/batch_scaling.py --output {OUTPUT}",
        f"python benchmarks/evidence/scale_schedule.py --output {OUTPUT}",
        f"python benchmarks/evidence/command_line.py --output {OUTPUT}",
    ),
}


def run(command: str) -> tuple[float, int]:
    """Run a command, and return its duration in seconds and its exit status."""
    print(f"$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    python = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    started = time.monotonic()
    done = subprocess.run(
        [*python[program], *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return time.monotonic() - started, done.returncode


def main() -> int:
    """Run the selected group, and return the exit status: 1 if a command failed, otherwise 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="use only a few samples and steps; requires the group `evidence`",
    )
    args = parser.parse_args()
    if args.smoke and args.group != "evidence":
        parser.error("--smoke requires the group `evidence`.")
    (ROOT / OUTPUT).mkdir(parents=True, exist_ok=True)
    console = Console()
    table = Table("command", "seconds", "result")
    failures = 0
    commands = [command + " --smoke" * args.smoke for command in GROUPS[args.group]]
    # Speed is measured without other programs on the machine. The longest runs start first.
    workers = os.cpu_count() if args.group == "evidence" else 1
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(run, commands))
    for command, (seconds, status) in zip(commands, results, strict=True):
        failures += status != 0
        table.add_row(
            command, f"{seconds:,.0f}", f"failed with status {status}" if status else "ok"
        )
    console.print(table)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

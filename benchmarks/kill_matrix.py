"""Kill runs at random moments, and check that resumed runs match an uninterrupted run exactly.

    python benchmarks/kill_matrix.py --kills 200

Each run saves a checkpoint every two steps. All its processes are killed with SIGKILL after a
random time, and restarted with the same config until the run is complete. A run has one or two
processes, synchronous or asynchronous saves, PyTorch or DeepSpeed as the backend, and one or two
engines in its script. The second engine saves to a subdirectory of the first engine's directory.

At each start, the run's clock is set back by another hour, because the choice of the newest
checkpoint must not depend on the clock. Each engine keeps its two newest automatic checkpoints. The
script also saves a checkpoint explicitly, which must never be deleted. At each step, the learning
rate, the data and a hash of the weights are compared with those of an uninterrupted run.

The exit status is 1 if a step differs, a run fails to restart, or the checkpoints at the end do not
have the same tags and steps as those of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.checkpoint import storage

SECOND = "second:"
SCRIPT = Path(__file__).parent.parent / "tests" / "testing" / "checkpoint_run.py"


class Case(NamedTuple):
    """Settings of a run, and the fraction of all kills that occur in runs with these settings."""

    backend: str
    processes: int
    mode: str
    engines: int
    fraction: float


CASES = (
    Case("torch", 1, "sync", 1, 0.15),
    Case("torch", 1, "sync", 2, 0.1),
    Case("torch", 1, "async", 1, 0.1),
    Case("torch", 1, "async", 2, 0.1),
    Case("torch", 2, "sync", 1, 0.1),
    Case("torch", 2, "sync", 2, 0.1),
    Case("torch", 2, "async", 1, 0.1),
    Case("torch", 2, "async", 2, 0.05),
    Case("deepspeed", 1, "sync", 1, 0.05),
    Case("deepspeed", 1, "sync", 2, 0.05),
    Case("deepspeed", 2, "sync", 1, 0.05),
    Case("deepspeed", 2, "sync", 2, 0.05),
)


class Run:
    """The processes of a single launch of a training run, one process per rank."""

    def __init__(self, case: Case, directory: Path, training_steps: int, start: int = 0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        arguments = directory, training_steps, case.backend, case.mode, case.engines
        command = [sys.executable, SCRIPT, *arguments, start]  # hours to set the clock back
        self.processes = [
            subprocess.Popen(  # ours
                [str(part) for part in command],
                env=os.environ
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.processes)},
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(case.processes)
        ]

    def read_first_row(self) -> str:
        out = self.processes[0].stdout
        assert out is not None
        for line in out:
            if is_row(line):
                return line
        return ""

    def kill(self, rng: random.Random) -> None:
        for process in rng.sample(self.processes, len(self.processes)):
            process.kill()

    def wait(self) -> tuple[str, bool]:
        rest, _ = self.processes[0].communicate()
        return rest, {process.wait() for process in self.processes} == {0}


def is_row(line: str) -> bool:
    """Return whether an output line is a complete row of results rather than a log message."""
    fields = line.split()
    is_step = bool(fields) and fields[0].removeprefix(SECOND).isdigit()
    return is_step and len(fields) == 4 and len(fields[3]) == 16


def parse_rows(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines() if is_row(line)}


def count_missing_checkpoints(directory: Path, whole: Path, engines: int) -> int:
    """Return the number of engines whose checkpoints are missing or have wrong tags or steps.

    Args:
        directory: directory of the run that was killed.
        whole: directory of the uninterrupted run to compare with.
        engines: number of engines in the script; each saves to its own directory.
    """
    lost = 0
    for name in ("", "second")[:engines]:
        found, expected = (
            {path.name: manifest.step for path, manifest in storage.list_checkpoints(each / name)}
            for each in (directory, whole)
        )
        lost += found != expected
    return lost


def kill_runs(
    case: Case,
    directory: Path,
    training_steps: int,
    kills: int,
    rng: random.Random,
    bar: Progress,
) -> tuple[int, int, int]:
    """Kill and restart runs with the settings of one case.

    Returns:
        The numbers of kills, runs and differences. A difference is a failed restart, or a check in
        which a run does not match the uninterrupted run.
    """
    whole, ended = Run(case, directory / "whole", training_steps).wait()
    assert ended, f"The uninterrupted run of {case} failed."
    expected = parse_rows(whole)
    name = f"{case.backend} {case.processes} {case.mode} {case.engines}"
    task = bar.add_task(name, total=kills)
    lost = done = runs = starts = 0
    while done < kills:
        runs += 1
        rows: dict[str, str] = {}
        while True:
            starts += 1
            run = Run(case, directory / str(runs), training_steps, starts)
            first = run.read_first_row()
            if done < kills:
                time.sleep(rng.uniform(0.0, 0.3))
                run.kill(rng)
                done += 1
                bar.advance(task)
            rest, ended = run.wait()
            for step, row in parse_rows(first + rest).items():
                lost += rows.setdefault(step, row) != row
            if ended:
                break
            if not first:  # the run could not start after the previous kill
                lost += 1
                break
        # Rows may be missing, because a run may be killed after it saves and before it prints.
        lost += not rows.items() <= expected.items()
        # A run that was killed between these two moments prints only the state at its end.
        for step in (str(training_steps + 1), f"{SECOND}{training_steps + 1}"):
            lost += rows.get(step) != expected.get(step)
        lost += count_missing_checkpoints(directory / str(runs), directory / "whole", case.engines)
    return done, runs, lost


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--training-steps", type=int, default=400, help="optimizer steps per run (default: 400)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)  # noqa: S311  # moments, not secrets
    console = Console()
    table = Table("backend", "processes", "saves", "engines", "kills", "runs", "differences")
    total = [0, 0, 0]
    with (
        tempfile.TemporaryDirectory() as directory,
        Progress(console=console, transient=True) as bar,
    ):
        for number, case in enumerate(CASES):
            case_dir = Path(directory, str(number))
            case_dir.mkdir()
            kills = max(1, round(args.kills * case.fraction))
            counts = kill_runs(case, case_dir, args.training_steps, kills, rng, bar)
            table.add_row(*map(str, case[:-1]), *map(str, counts))
            console.print("  ".join(map(str, (*case[:-1], *counts))))
            total = [a + b for a, b in zip(total, counts, strict=True)]
    console.print(table)
    console.print(
        "{} kills in {} runs of {} steps: {} differences".format(
            *total[:2], args.training_steps, total[2]
        )
    )
    sys.exit(1 if total[2] else 0)


if __name__ == "__main__":
    main()

"""Kill runs at random moments, and check that each resumes exactly like an uninterrupted run.

    python benchmarks/kill_matrix.py --kills 200

A run saves every second step: in one process and in two, synchronously and asynchronously, on
PyTorch and on DeepSpeed. All of its processes are killed (SIGKILL) after a random time, and
started again with the same config until the run is complete. The learning rate, data and weights
(a hash) of every step are compared with those of an uninterrupted run.

The exit status is 1 if a run lost anything.
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

SCRIPT = Path(__file__).parent.parent / "tests" / "testing" / "checkpoint_run.py"


class Case(NamedTuple):
    """One kind of run, and the fraction of the kills that it gets."""

    backend: str
    processes: int
    mode: str
    share: float


CASES = (
    Case("torch", 1, "sync", 0.25),
    Case("torch", 1, "async", 0.2),
    Case("torch", 2, "sync", 0.2),
    Case("torch", 2, "async", 0.15),
    Case("deepspeed", 1, "sync", 0.1),
    Case("deepspeed", 2, "sync", 0.1),
)


class Run:
    """The processes of one start, and the output of rank 0."""

    def __init__(self, case: Case, folder: Path, updates: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, SCRIPT, folder, updates, case.backend, case.mode]
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

    def first_line(self) -> str:
        out = self.processes[0].stdout
        assert out is not None
        for line in out:
            if is_row(line):
                return line
        return ""

    def kill(self, randomness: random.Random) -> None:
        for process in randomness.sample(self.processes, len(self.processes)):
            process.kill()

    def end(self) -> tuple[str, bool]:
        rest, _ = self.processes[0].communicate()
        return rest, {process.wait() for process in self.processes} == {0}


def is_row(line: str) -> bool:
    """Return whether a line is a complete row; DeepSpeed logs to the same stream."""
    fields = line.split()
    return len(fields) == 4 and fields[0].isdigit() and len(fields[3]) == 16


def rows_of(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines() if is_row(line)}


def lost_of(
    case: Case, folder: Path, updates: int, kills: int, randomness: random.Random, bar: Progress
) -> tuple[int, int, int]:
    """Kill runs of one case; return the number of kills, of runs, and of lost starts and steps."""
    whole, ended = Run(case, folder / "whole", updates).end()
    assert ended, f"{case} does not run"
    expected = rows_of(whole)
    task = bar.add_task(f"{case.backend} {case.processes} {case.mode}", total=kills)
    lost = done = runs = 0
    while done < kills:
        runs += 1
        rows: dict[str, str] = {}
        while True:
            run = Run(case, folder / str(runs), updates)
            first = run.first_line()
            if done < kills:
                time.sleep(randomness.uniform(0.0, 0.3))
                run.kill(randomness)
                done += 1
                bar.advance(task)
            rest, ended = run.end()
            for step, row in rows_of(first + rest).items():
                lost += rows.setdefault(step, row) != row
            if ended:
                break
            if not first:  # it could not even start after the previous kill
                lost += 1
                break
        # A process that dies between saving and printing omits one line; nothing else.
        lost += not rows.items() <= expected.items()
        lost += rows.get(str(updates)) != expected[str(updates)]
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
    randomness = random.Random(args.seed)  # noqa: S311  # moments, not secrets
    console = Console()
    table = Table("backend", "processes", "saves", "kills", "runs", "lost")
    total = [0, 0, 0]
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as bar:
        for number, case in enumerate(CASES):
            place = Path(folder, str(number))
            place.mkdir()
            kills = round(args.kills * case.share)
            found = lost_of(case, place, args.updates, kills, randomness, bar)
            table.add_row(case.backend, str(case.processes), case.mode, *map(str, found))
            total = [a + b for a, b in zip(total, found, strict=True)]
    console.print(table)
    console.print(
        "{} kills in {} runs of {} steps: {} lost".format(*total[:2], args.updates, total[2])
    )
    sys.exit(1 if total[2] else 0)


if __name__ == "__main__":
    main()

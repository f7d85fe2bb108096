"""Interrupt runs at random steps, and check that resumed runs match an uninterrupted run exactly.

    python benchmarks/random_cuts.py --cuts 30

Each run is started twice. The first time, the run is killed, receives SIGTERM or SIGINT (Ctrl-C),
exits after an epoch, or completes all its steps. The second time, the run resumes. Each step's
samples, learning rate and hash of the weights are compared with those of an uninterrupted run. The
runs use one or two ranks and one of four training loops:

- ``batches`` iterates over ``trainer.batches()``;
- ``workers`` does the same, with a custom data loader that has two workers;
- ``epochs`` loops over the remaining epochs;
- ``script`` saves and loads checkpoints itself.

This program exits with status 1 if any steps differ. Only a killed run may repeat steps,
namely those after its latest checkpoint.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "testing" / "cut_run.py"
STEPS = 18
CUTS = {
    "batches": ("kill", "SIGTERM", "SIGINT", "none"),
    "workers": ("kill", "SIGTERM", "SIGINT", "none"),
    "epochs": ("kill", "SIGTERM", "SIGINT", "epoch", "none"),
    "script": ("kill", "epoch", "none"),
}
STATUS = {"kill": {1, -9}, "SIGTERM": {75, 1}, "SIGINT": {130, 1, -2}, "epoch": {0}, "none": {0}}
"""Expected exit statuses for each kind of interruption.

torchrun exits with 1 if a rank fails. If Ctrl-C arrives before the first step, the run ends at
once, because there is nothing to save.
"""


class Case(NamedTuple):
    """The training loop and world size of a run, and the kind and step of its interruption."""

    loop: str
    ranks: int
    cut: str
    step: int


def start(directory: Path, case: Case) -> int:
    launcher = [sys.executable]
    if case.ranks > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--log-dir={directory / 'torchrun'}",
            f"--nproc_per_node={case.ranks}",
        ]
    command = [*launcher, SCRIPT, directory, case.loop, case.cut, str(case.step)]
    with (directory / "output").open("a") as output:
        return subprocess.run(
            [str(part) for part in command], stdout=output, stderr=output, check=False, timeout=300
        ).returncode


def read_rows(directory: Path, ranks: int) -> list[str]:
    """Return each rank's rows, one per training step, prefixed with the rank."""
    return [
        f"{rank}: {row}"
        for rank in range(ranks)
        for row in (directory / f"rows.{rank}").read_text().splitlines()
    ]


def count_differences(case: Case, directory: Path, expected: list[str]) -> tuple[int, int]:
    """Interrupt and resume a run, and compare its rows with those of an uninterrupted run.

    Each row describes one training step of one rank.

    Returns:
        The number of rows that differ, and the number of repeated rows. Only a killed run may
        repeat rows. For any other run, repeated rows also count as rows that differ.
    """
    status = start(directory, case)
    assert status in STATUS[case.cut], (case, status, (directory / "output").read_text()[-3000:])
    again = start(directory, case._replace(cut="none"))
    assert again == 0, (case, again, (directory / "output").read_text()[-3000:])
    rows = Counter(read_rows(directory, case.ranks))
    different = len(rows.keys() ^ set(expected))
    repeated = sum(rows.values()) - len(rows)
    # Only a killed run repeats steps: those since its last checkpoint.
    return different + (repeated if case.cut != "kill" else 0), repeated


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)  # noqa: S311  # moments, not secrets
    kinds = [(loop, ranks, cut) for loop, cuts in CUTS.items() for ranks in (1, 2) for cut in cuts]
    rng.shuffle(kinds)
    cases = [Case(*kinds[index % len(kinds)], rng.randrange(STEPS)) for index in range(args.cuts)]
    console = Console()
    table = Table("loop", "ranks", "cut", "before step", "steps repeated", "steps different")
    total = 0
    whole: dict[tuple[str, int], list[str]] = {}
    with tempfile.TemporaryDirectory() as root:
        for number, case in enumerate(track(cases, console=console, transient=True)):
            if case[:2] not in whole:
                directory = Path(root, f"{case.loop}{case.ranks}")
                directory.mkdir()
                assert start(directory, case._replace(cut="none")) == 0
                whole[case[:2]] = read_rows(directory, case.ranks)
                assert len(whole[case[:2]]) == STEPS * case.ranks
            directory = Path(root, str(number))
            directory.mkdir()
            different, repeated = count_differences(case, directory, whole[case[:2]])
            table.add_row(
                case.loop, str(case.ranks), case.cut, *map(str, (case.step, repeated, different))
            )
            total += different
    console.print(table)
    console.print(f"{len(cases)} interruptions: {total} steps differ")
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()

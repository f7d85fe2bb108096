"""Kill runs at random moments, and see whether each goes on as the uninterrupted one.

    python benchmarks/kill_matrix.py --kills 200

A run of the PyTorch backend saves every second update. It is killed (SIGKILL) after a random time,
and started again with the same config until it is through; every update's learning rate, data and
weights (a hash) are compared with those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

SCRIPT = Path(__file__).parent.parent / "tests" / "engine" / "checkpoint_run.py"


def start(folder: str, updates: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), folder, str(updates)]
    return subprocess.Popen(  # noqa: S603  # ours
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--updates", type=int, default=400, help="length of a run (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    randomness = random.Random(args.seed)  # noqa: S311  # moments, not secrets
    console = Console()
    lost = kills = runs = 0
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as bar:
        whole, _ = start(f"{folder}/whole", args.updates).communicate()
        expected = {line.split(" ", 1)[0]: line for line in whole.splitlines()}
        task = bar.add_task("kills", total=args.kills)
        while kills < args.kills:
            runs += 1
            rows: dict[str, str] = {}
            while True:
                process = start(f"{folder}/{runs}", args.updates)
                assert process.stdout is not None
                first = process.stdout.readline()
                if kills < args.kills:
                    time.sleep(randomness.uniform(0.0, 0.3))
                    process.kill()
                    kills += 1
                    bar.advance(task)
                rest, _ = process.communicate()
                for line in (first + rest).splitlines():
                    step = line.split(" ", 1)[0]
                    complete = len(line.split()) == 4 and len(line.split()[3]) == 16
                    if complete and rows.setdefault(step, line) != line:
                        lost += 1
                if process.returncode == 0:
                    break
            # A process that died between saving and printing leaves out a line, and nothing else.
            lost += not rows.items() <= expected.items()
            lost += rows[str(args.updates)] != expected[str(args.updates)]
    console.print(f"{kills} kills in {runs} runs of {args.updates} updates: {lost} lost")


if __name__ == "__main__":
    main()

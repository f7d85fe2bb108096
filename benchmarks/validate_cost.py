"""Compare the CPU time and memory that onecycle and DeepSpeed need to validate a config.

    python benchmarks/validate_cost.py

For each command, the script prints the CPU time (user and system), the ratios of this time to the
CPU times of ``python -c pass`` and onecycle, and the peak memory (largest resident set size). Every
round runs each command once, in a new process. Times and ratios are medians over the rounds; the
peak memory is the maximum.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

EXAMPLE = Path(__file__).parent.parent / "examples" / "fashion_mnist" / "ds_config.json"
DEEPSPEED = "import sys; from deepspeed import DeepSpeedConfig; DeepSpeedConfig(sys.argv[1])"
MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def cost(command: list[str]) -> tuple[float, float]:
    """Return the CPU time in ms and the peak memory in MiB of a command, including its children."""
    measure = [sys.executable, "-I", "-S", "-c", MEASURED, *command]
    run = subprocess.run(measure, capture_output=True, text=True, check=True)  # ours
    seconds, kib = map(float, run.stdout.split())
    return seconds * 1e3, kib / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("config", nargs="?", default=str(EXAMPLE))
    args = parser.parse_args()
    python = [sys.executable, "-c"]
    contenders = {
        "python -c pass": [*python, "pass"],
        "import jsonschema": [*python, "import jsonschema"],
        "onecycle validate": [
            str(Path(sys.executable).parent / "onecycle"),
            "validate",
            args.config,
        ],
        "DeepSpeedConfig": [*python, DEEPSPEED, args.config],
    }
    console = Console()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    memory = dict.fromkeys(contenders, 0.0)
    for _ in track(range(args.rounds), "processes", console=console, transient=True):
        for name, command in contenders.items():
            milliseconds, mebibytes = cost(command)
            times[name].append(milliseconds)
            memory[name] = max(memory[name], mebibytes)
    table = Table("process", "CPU ms", "times bare Python", "times onecycle", "peak MiB")
    bare, ours = times["python -c pass"], times["onecycle validate"]
    for name, each in times.items():
        ratios = [
            f"{statistics.median(a / b for a, b in zip(each, other, strict=True)):.1f}"
            for other in (bare, ours)
        ]
        table.add_row(name, f"{statistics.median(each):.0f}", *ratios, f"{memory[name]:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()

"""Run many kinds of training loop on every backend and ZeRO stage, on one rank and on two.

    python benchmarks/training_loops.py > docs/results/training_loops.md

The final weights are compared with two references: plain DeepSpeed at the same stage, and a
hand-written PyTorch loop. Each table cell shows the largest difference from the closer reference,
or "refused" if the engine rejects the loop.
"""

from __future__ import annotations

import logging
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from rich.console import Console

from tests.testing.distributed import run_distributed_test
from tests.testing.training_loops import BF16, LOOPS, run_loop

TOLERANCE = {False: 1e-6, True: 2e-2}
"""Maximum difference at which weights count as equal. Key: True for bf16, False for float32."""
HEAD = """\
# Thirteen training loops

`python benchmarks/training_loops.py`, {date}, two cores (x86-64), gloo. Each loop trains small
models for four AdamW steps; each rank has its own data. The final weights are compared with two
references: plain DeepSpeed at the same stage, and a hand-written PyTorch loop. A cell shows the
largest difference from the closer reference. Differences up to {fp32:g} in float32 and up to
{bf16:g} in bf16 are rounding errors. On two ranks, a number also means that the weights of both
ranks are bit-identical, except for MoE, whose experts differ by design. With the PyTorch
backend, a single process has nothing to shard, so stages 1 to 3 are the same as stage 0.
"""


def measure(loop: str, world_size: int, backend: str, stage: int, refusals: dict[str, str]) -> str:
    """Run a training loop on a backend, and return the text of its table cell.

    If the engine rejects the loop, the error message is added to ``refusals`` with a number, and
    the cell contains that number.
    """
    results = run_distributed_test(run_loop, world_size, loop, backend, stage)
    if "error" in results[0]:
        number = refusals.setdefault(results[0]["error"], str(len(refusals) + 1))
        return f"refused [{number}]"
    if loop != "MoE" and any(each["weights"] != results[0]["weights"] for each in results):
        return "**RANKS DIFFER**"
    differences = []
    for kind in ("by hand", "plain deepspeed"):
        expected = run_distributed_test(run_loop, world_size, loop, kind, stage)
        if "error" not in expected[0]:
            differences.append(find_difference(results, expected))
    if not differences:
        return "no reference"
    difference = min(differences)
    is_equal = difference <= TOLERANCE[loop in BF16]
    return f"{difference:.0e}" if is_equal and difference else "0" if is_equal else "**DIFFERENT**"


def find_difference(results: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Return the largest difference between the final weights of two runs, over all ranks."""
    return max(
        abs(own - other)
        for mine, theirs in zip(results, expected, strict=True)
        for row, other_row in zip(mine["weights"], theirs["weights"], strict=True)
        for own, other in zip(row, other_row, strict=True)
    )


def main() -> None:
    logging.disable(logging.WARNING)
    print(HEAD.format(date=datetime.now(tz=UTC).date(), fp32=1e-6, bf16=2e-2))
    columns = [("torch", stage) for stage in range(4)] + [
        ("deepspeed", stage) for stage in range(4)
    ]
    names = [f"{backend} {stage}" for backend, stage in columns]
    refusals: dict[str, str] = {}
    with Console(stderr=True).status("") as status:
        for world_size in (1, 2):
            print(f"\n## {world_size} rank{'s' * (world_size > 1)}\n")
            print(f"| loop | {' | '.join(names)} |")
            print("|---" * (len(names) + 1) + "|")
            for loop in LOOPS:
                cells = []
                for backend, stage in columns:
                    status.update(f"{loop}, {backend} {stage}")
                    if backend == "torch" and stage and world_size == 1:
                        cells.append("")
                        continue
                    cells.append(measure(loop, world_size, backend, stage, refusals))
                print(f"| {loop} | {' | '.join(cells)} |")
    print("\nRefusals:\n")
    for error, number in refusals.items():
        print(textwrap.fill(f"{number}. {error}", 120, subsequent_indent="   "))


if __name__ == "__main__":
    main()

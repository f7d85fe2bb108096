"""Compare the CPU time and decisions of onecycle's AutoWU with those of the published code.

    OMP_NUM_THREADS=1 python benchmarks/autowu_decision.py

AutoWU regularly tests whether the loss has passed its minimum. If it has, AutoWU ends the warmup.
The script prints the median CPU time of onecycle's two tests, "reference" and "robust", for
different numbers of losses, and the speedup over the published code. One test takes the published
code 176 ms for 70 losses and 230 ms for 1,000 or more (measured with gpytorch 1.15.2, torch 2.13.0
and one thread on an idle machine).

The script also replays recorded warmups with the "reference" test, and prints how many of them end
at the same step as in the published code.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from schedules.feedback.gaussian_process import Hyperparameters
from schedules.feedback.minimum_tests import run_published_test, run_robust_test
from schedules.feedback.warmup_tests import TorchSampler
from tests.schedules.feedback.test_autowu import CURVES, find_decision

PUBLISHED = {70: 176.0, 1_000: 230.0, 10_000: 230.0}  # ms


def measure_milliseconds(test: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        test()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    random = np.random.default_rng(0)
    table = Table("losses", "reference, ms", "speedup", "robust, ms", "speedup")
    for count, theirs in PUBLISHED.items():
        losses = random.normal(1, 0.1, count).astype(np.float32)

        def reference(losses: np.ndarray = losses) -> object:
            return run_published_test(losses, Hyperparameters.initial(), TorchSampler().sample)

        def robust(losses: np.ndarray = losses) -> object:
            return run_robust_test(losses)

        ours, ours_robust = (
            measure_milliseconds(reference, args.rounds // 4),
            measure_milliseconds(robust, args.rounds),
        )
        ratios = (f"{theirs / ours:.0f}x", f"{theirs / ours_robust:.0f}x")
        table.add_row(f"{count:,}", f"{ours:.2f}", ratios[0], f"{ours_robust:.2f}", ratios[1])
    console = Console()
    console.print(table)
    same = 0
    for curve in CURVES:
        decision = find_decision(curve)
        kind = "test" if "passed" in decision.reason else "timeout"
        same += (decision.step, kind) == (curve["trans_step"], curve["how"])
    console.print(
        f"reference: {same} of {len(CURVES)} recorded warmups end at the same step as with the "
        "published code"
    )


if __name__ == "__main__":
    main()

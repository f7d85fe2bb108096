"""Compare the speed of the 1Cycle schedules of onecycle, PyTorch and DeepSpeed.

    python benchmarks/scheduler_speed.py

The script measures the CPU time of a scheduler step and of computing a whole curve. It prints
medians over several rounds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import schedules

CYCLE = {
    "cycle_min_lr": 1e-4,
    "cycle_max_lr": 1e-3,
    "cycle_first_step_size": 500_000,
    "cycle_min_mom": 0.85,
    "cycle_max_mom": 0.95,
}
Step = Callable[[], object]


def build_optimizer(groups: int) -> torch.optim.Optimizer:
    one = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)]
    return torch.optim.Adam(one, lr=1e-3)


def build_bare_loop(groups: int) -> Callable[[int], None]:
    """Build the baseline: a loop that only assigns a learning rate and betas to each group."""
    optimizer = build_optimizer(groups)
    param_groups = optimizer.param_groups

    def run(steps: int) -> None:
        lr, momentum = 1e-3, 0.9
        for _ in range(steps):
            for group in param_groups:
                group["lr"] = lr
                group["betas"] = (momentum, 0.999)

    return run


def repeat_step(step: Step) -> Callable[[int], None]:
    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


def build_contenders(groups: int) -> dict[str, Callable[[int], None]]:
    """Return a dict that maps scheduler names to functions that run a given number of steps.

    The dict includes the bare loop as the baseline.
    """
    from deepspeed.runtime.lr_schedules import OneCycle

    own = CYCLE | {
        "cycle_min_lr": [1e-4 * (1 + index / groups) for index in range(groups)],
        "cycle_max_lr": [1e-3 * (1 + index / groups) for index in range(groups)],
    }
    torch_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        build_optimizer(groups), 1e-3, total_steps=10**9
    )
    # Suppress the warning that optimizer.step() was not called.
    torch_scheduler.optimizer._opt_called = True
    return {
        "bare loop": build_bare_loop(groups),
        "onecycle": repeat_step(
            schedules.attach("OneCycle", build_optimizer(groups), **CYCLE).step
        ),
        "onecycle, bounds per group": repeat_step(
            schedules.attach("OneCycle", build_optimizer(groups), **own).step
        ),
        "DeepSpeed": repeat_step(OneCycle(build_optimizer(groups), **CYCLE).step),
        "PyTorch": repeat_step(torch_scheduler.step),
    }


def measure_cpu_time(run: Callable[[int], object], amount: int) -> float:
    start = time.process_time()
    run(amount)
    return time.process_time() - start


def time_steps(console: Console, rounds: int) -> None:
    table = Table("1Cycle, one step()", title="median microseconds (ratio to the bare loop)")
    for groups in (1, 2, 16, 256):
        table.add_column(f"{groups} group{'s' * (groups > 1)}", justify="right")
    cells: dict[str, list[str]] = {}
    for groups in (1, 2, 16, 256):
        running = build_contenders(groups)
        amount = max(200, 20_000 // groups)
        times: dict[str, list[float]] = {name: [] for name in running}
        for _ in track(range(rounds), f"{groups} groups", console=console, transient=True):
            for name, run in running.items():
                times[name].append(measure_cpu_time(run, amount) / amount * 1e6)
        bare = times["bare loop"]
        for name, each in times.items():
            ratio = statistics.median(a / b for a, b in zip(each, bare, strict=True))
            cells.setdefault(name, []).append(f"{statistics.median(each):.3f} ({ratio:.2f}x)")
    for name, row in cells.items():
        table.add_row(name, *row)
    console.print(table)


def compute_with_numpy(steps: int) -> list[np.ndarray]:
    """Compute the learning rate and momentum curves in plain numpy, as a baseline."""
    first, end = steps // 4, steps // 2
    progress = np.zeros(steps)
    progress[: first + 1] = np.floor(np.arange(first + 1) * (500 / first)) / 500
    progress[first : end + 1] = progress[first::-1][: end + 1 - first]
    lr, momentum = 1e-4 + 9e-4 * progress, 0.95 - 0.1 * progress
    lr[end:] = 1e-4 / (1 + np.arange(steps - end) / (steps // 10))
    return [lr, momentum]


def time_curve(console: Console, rounds: int, steps: int) -> None:
    from deepspeed.runtime.lr_schedules import OneCycle

    whole = CYCLE | {
        "cycle_first_step_size": steps // 4,
        "cycle_first_stair_count": 500,
        "decay_step_size": steps // 10,
        "decay_lr_rate": 1.0,
    }
    block = {"type": "OneCycle", "params": whole}

    def step_deepspeed(count: int) -> None:
        repeat_step(OneCycle(build_optimizer(1), **whole).step)(count)

    running: dict[str, Callable[[int], object]] = {
        "numpy by hand": compute_with_numpy,
        "onecycle": lambda count: schedules.trace(block, count),
        "stepping DeepSpeed": step_deepspeed,
    }
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in track(range(rounds), f"{steps:,} steps", console=console, transient=True):
        for name, run in running.items():
            times[name].append(measure_cpu_time(run, steps) * 1e3)
    ours = times["onecycle"]
    table = Table(
        f"1Cycle with stairs and decay, {steps:,} steps",
        "CPU ms",
        "times ours",
        title="the whole curve",
    )
    for name, each in times.items():
        ratio = statistics.median(a / b for a, b in zip(each, ours, strict=True))
        table.add_row(name, f"{statistics.median(each):.2f}", f"{ratio:.2f}x")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=25,
        help="number of timing rounds for single steps (default: 25)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1_000_000,
        help="number of steps in the whole curve (default: 1000000)",
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    console = Console()
    time_steps(console, args.rounds)
    time_curve(console, max(3, args.rounds // 5), args.steps)


if __name__ == "__main__":
    main()

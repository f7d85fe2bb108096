"""Show how costs grow with the number of param groups, parameters, config entries and steps.

    python benchmarks/growth.py [--only groups] [--steps 1000000]

Each case is measured in a new process. Times are CPU times, which other programs barely affect. The
time of a step is the mean over several steps. The column "growth" compares each row with the
previous one. It shows the growth exponent of the cost that grew fastest: 0 means constant cost, 1
means linear cost, and 2 means quadratic cost.

- groups: the times of start-up, a step, saving and loading, for a model in which each param group
  has one tensor of one element. "plain step" is a step with PyTorch's optimizer but without the
  engine.
- parameters: the same times, and the peak resident memory, for a model with 100 tensors in one
  param group. A second table covers only the schedule, for models on the meta device with up to
  1e9 parameters.
- config: the time of a call to `validate` on a config with many param groups, schedule phases,
  unknown keys or comments.
- steps: the time of a step and the resident memory in each tenth of a tiny model's training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

Row = dict[str, float]

SCHEDULE = {"type": "CosineAnnealingLR", "params": {"T_max": 1_000_000}}
CONFIG = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "scheduler": SCHEDULE,
    "steps_per_print": 1_000_000_000,
}
CONFIG_LIMITS = {"param groups": 200, "phases": 10_000, "unknown keys": 10_000, "comments": 10_000}
RUNS: dict[str, dict[str, Any]] = {
    "cosine": {},
    "AutoWU": {"scheduler": {"type": "AutoWU"}},
    "CSV and TensorBoard": {"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True}},
}


def clock(function: Callable[[], object], repeats: int = 1) -> float:
    """Return the mean CPU time of ``repeats`` calls to ``function``, in milliseconds.

    The time includes all threads of this process.
    """
    begin = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - begin) * 1e3 / repeats


def read_memory() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_groups(count: int, directory: Path) -> Row:
    import torch

    import engine

    def build(count: int) -> tuple[Any, list[dict[str, Any]]]:
        model = torch.nn.ParameterList(torch.ones(1) for _ in range(count))
        lrs = (0.01 + 0.001 * (index % 7) for index in range(count))
        return model, [{"params": [p], "lr": lr} for p, lr in zip(model, lrs, strict=True)]

    def start(built: tuple[Any, list[dict[str, Any]]]) -> Any:
        return engine.initialize(config=CONFIG, model=built[0], model_parameters=built[1])[0]

    start(build(1))  # imports
    built = build(count)
    found: Row = {}
    trainers: list[Any] = []
    found["start-up"] = clock(lambda: trainers.append(start(built)))
    trainer = trainers[0]
    steps = max(3, 300 // count)

    def fill(module: torch.nn.Module) -> None:
        for each in module.parameters():
            each.grad = torch.ones(1)

    def step() -> None:
        trainer.backward(trainer.module[0].sum())
        fill(trainer.module)
        trainer.step()

    plain_model, plain_groups = build(count)
    optimizer = torch.optim.AdamW(plain_groups, lr=0.01)

    def plain() -> None:
        plain_model[0].sum().backward()
        fill(plain_model)
        optimizer.step()
        optimizer.zero_grad()

    step()
    plain()
    found["step"], found["plain step"] = clock(step, steps), clock(plain, steps)
    found["save"] = clock(lambda: trainer.save_checkpoint(directory))
    other = start(build(count))
    found["load"] = clock(lambda: other.load_checkpoint(directory))
    return found


def measure_parameters(count: int, directory: Path) -> Row:
    import torch

    import engine

    def start(model: torch.nn.Module) -> Any:
        return engine.initialize(config=CONFIG, model=model, model_parameters=model.parameters())[0]

    start(build_tensors(100, "cpu"))  # imports
    model = build_tensors(count, "cpu")
    found: Row = {}
    trainers: list[Any] = []
    found["start-up"] = clock(lambda: trainers.append(start(model)))
    trainer = trainers.pop()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def step() -> None:
        trainer.backward(sum(each.sum() for each in trainer.module))
        trainer.step()

    def plain() -> None:
        sum(each.sum() for each in model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    found["step"] = clock(step, 3)
    found["save"] = clock(lambda: trainer.save_checkpoint(directory))
    found["load"] = clock(lambda: trainer.load_checkpoint(directory))
    found["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trainer.optimizer.state.clear()  # two optimizers would not fit
    plain()
    return found | {"plain step": clock(plain, 3)}


def measure_schedule(count: int) -> Row:
    import torch

    import schedules

    model = build_tensors(count, "meta")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    curve = schedules.CosineAnnealingLR(T_max=1_000_000)
    found: Row = {}
    binders: list[Any] = []
    found["attach"] = clock(lambda: binders.append(schedules.attach(curve, optimizer)))
    optimizer.step()
    return found | {"step of the schedule": clock(binders[0].step, 1000)}


def build_tensors(count: int, device: str) -> Any:
    """Build a model of 100 tensors with ``count`` elements in total."""
    import torch

    values = (torch.ones(count // 100, device=device) for _ in range(100))
    return torch.nn.ParameterList(map(torch.nn.Parameter, values))


def build_config(kind: str, count: int) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    if kind == "param groups":
        groups = [{"params": f"layer{index}\\.", "lr": 0.01} for index in range(count)]
        config["optimizer"]["param_groups"] = groups
    elif kind == "phases":
        phases = [{"to": 0.001 * (1 + index % 9), "duration": 10} for index in range(count)]
        config["scheduler"] = {"type": "Phases", "params": {"lr": phases}}
    elif kind == "unknown keys":
        config |= {f"unknown_{index}": index for index in range(count)}
    else:
        config |= {f"x-comment-{index}": {"text": "x" * 20} for index in range(count)}
    return config


def measure_config(kind: str, count: int, directory: Path) -> Row:
    import engine

    small, large = directory / "small.json", directory / "large.json"
    small.write_text(json.dumps(build_config(kind, 2), indent=1))
    large.write_text(json.dumps(build_config(kind, count), indent=1))
    engine.validate(small)  # imports
    found: list[Any] = []
    milliseconds = clock(lambda: found.extend(engine.validate(large)))
    return {"validate": milliseconds, "problems": len(found), "KiB": large.stat().st_size / 1024}


def measure_steps(kind: str, steps: int, directory: Path) -> list[Row]:
    import torch

    import engine

    os.chdir(directory)
    model = torch.nn.Linear(4, 1)
    config = CONFIG | RUNS[kind]
    if kind == "AutoWU":
        run = {"steps_per_epoch": steps // 10, "total_epochs": 11}  # long epochs, which it stores
        params = {"test": "robust", "decay_phase_stat": "loss", "max_warmup_fraction": 0.3} | run
        config |= {"scheduler": {"type": "AutoWU", "params": params}}
    trainer = engine.initialize(config=config, model=model, model_parameters=model.parameters())[0]
    x = torch.ones(4, 4)

    def run(count: int) -> None:
        for _ in range(count):
            trainer.backward(trainer(x).square().mean() + 1.0)
            trainer.step()

    run(min(1000, steps // 10))
    rows = []
    for _ in range(10):
        milliseconds = clock(lambda: run(steps // 10))
        rows.append({"us per step": milliseconds * 1e3 / (steps // 10), "MiB": read_memory()})
    return rows


def run_case(case: list[Any]) -> Any:
    """Measure one case in a new process, and return its results."""
    with tempfile.TemporaryDirectory(prefix="growth_") as directory:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, __file__, "--case", json.dumps([*case, directory])],
            env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure(task: str, *arguments: Any) -> Any:
    """Measure a case in this process, and return its results."""
    *rest, directory = arguments
    path = Path(directory)
    if task == "groups":
        return measure_groups(rest[0], path)
    if task == "parameters":
        return measure_parameters(rest[0], path)
    if task == "schedule":
        return measure_schedule(rest[0])
    if task == "config":
        return measure_config(rest[0], rest[1], path)
    return measure_steps(rest[0], rest[1], path)


def print_rows(title: str, rows: dict[str, Row]) -> None:
    """Print the rows as a Markdown table."""
    names = list(next(iter(rows.values())))
    print(f"\n| {title} |", " | ".join(names), "|")
    print("|---" * (len(names) + 1) + "|")
    for label, row in rows.items():
        cells = (
            "" if math.isnan(row[name]) else f"{row[name]:,.{0 if name == 'problems' else 1}f}"
            for name in names
        )
        print(f"| {label} |", " | ".join(cells), "|", flush=True)


def print_sizes(title: str, task: list[Any], sizes: list[int]) -> None:
    """Measure the task at each size, and print the results and the growth exponents."""
    rows: dict[str, Row] = {}
    last: Row = {}
    for size, last_size in zip(sizes, [0, *sizes], strict=False):
        row = run_case([*task, size])
        growth = math.nan
        if last:
            ratio = max(row[name] / last[name] for name in row if name != "problems")
            growth = math.log(ratio) / math.log(size / last_size)
        rows[f"{size:,}"] = row | {"growth": growth}
        last = row
    print_rows(title, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = ("groups", "parameters", "config", "steps")
    parser.add_argument("--only", choices=parts)
    parser.add_argument(
        "--steps",
        type=int,
        default=20_000,
        help='number of training steps per run in the "steps" part (default: 20000)',
    )
    parser.add_argument(
        "--largest",
        type=float,
        default=1e8,
        help="number of parameters of the largest model (2e8 parameters need 7 GB of memory)",
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*json.loads(args.case))))
        return
    chosen = [args.only] if args.only else parts
    if "groups" in chosen:
        print_sizes("param groups, ms", ["groups"], [1, 10, 100, 1000, 10_000])
    if "parameters" in chosen:
        sizes = [n for n in (10**4, 10**5, 10**6, 10**7, 10**8, 2 * 10**8) if n <= args.largest]
        print_sizes("parameters, ms", ["parameters"], sizes)
        print_sizes("parameters on the meta device, ms", ["schedule"], [10**4, 10**9])
    if "config" in chosen:
        for kind, limit in CONFIG_LIMITS.items():
            sizes = [n for n in (10, 100, 1000, 10_000) if n < limit] + [limit]
            print_sizes(f"{kind} in the config, ms", ["config", kind], sizes)
    if "steps" in chosen:
        for kind in RUNS:
            tenths = enumerate(run_case(["steps", kind, args.steps]), start=1)
            print_rows(f"steps, {kind}", {f"{args.steps * k // 10:,}": row for k, row in tenths})


if __name__ == "__main__":
    main()

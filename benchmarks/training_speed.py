"""Compare the CPU time of a training step in onecycle, a raw PyTorch loop and other libraries.

    python benchmarks/training_speed.py

Each contender runs single-threaded in its own process, so that contenders do not share a heap. The
processes take turns. For an MLP and a small GPT, the table shows the median CPU time per training
step, and the median ratio to the raw loop (PyTorch's default AdamW, clip_grad_norm_ and zero_grad).
The column "calls (MLP)" shows the number of function calls per training step of the MLP, counted by
cProfile.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import logging
import multiprocessing
import os
import pstats
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

import engine

CLIP = 1.0
STEPS = 10**6
CYCLE = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": STEPS}
Step = Callable[[], None]


class Block(nn.Module):
    """A transformer block of a GPT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 6, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    return model, torch.randn(32, 64), torch.randint(10, (32,))


def gpt() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    blocks = [Block(384) for _ in range(5)]
    model = nn.Sequential(nn.Embedding(1024, 384), *blocks, nn.Linear(384, 1024))
    for parameter in model.parameters():
        # Embeddings with a standard deviation of 1 cause denormals in the attention. Their cost
        # would dominate the measurement.
        parameter.data.clamp_(-0.04, 0.04)
    return model, torch.randint(1024, (4, 64)), torch.randint(1024, (256,))


def loss_fn(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output.flatten(0, -2), y)


def bound(task: Callable[[], tuple]) -> Step:
    """Return a step that only computes gradients, to measure a lower bound on the step time."""
    model, x, y = task()

    def step() -> None:
        loss_fn(model(x), y).backward()
        model.zero_grad()

    return step


def raw(task: Callable[[], tuple], *, fused: bool | None) -> Step:
    model, x, y = task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)

    def step() -> None:
        loss_fn(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def config(size: int, backend: str = "torch", stage: int = 0) -> dict:
    zero = {"zero_optimization": {"stage": stage}} if stage else {}
    return {
        "train_batch_size": size,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}},
        "scheduler": {"type": "OneCycle", "params": CYCLE},
        "engine": {"backend": backend},
        **zero,
    }


def loop(trainer: object, x: torch.Tensor, y: torch.Tensor) -> Step:
    def step() -> None:
        trainer.backward(loss_fn(trainer(x), y))
        trainer.step()

    return step


def alone() -> None:
    """Create a process group of one rank, and disable DeepSpeed's shared-memory communication."""
    os.environ["LOCAL_RANK"] = "0"
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed as peer

    peer.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def ours(task: Callable[[], tuple], backend: str = "torch", stage: int = 0) -> Step:
    if backend == "deepspeed":
        alone()
    model, x, y = task()
    trainer, *_ = engine.initialize(config=config(len(x), backend, stage), model=model)
    return loop(trainer, x, y)


def ours_unfused(task: Callable[[], tuple]) -> Step:
    model, x, y = task()
    plain = config(len(x))
    plain["optimizer"]["params"]["torch_adam"] = True
    trainer, *_ = engine.initialize(config=plain, model=model)
    return loop(trainer, x, y)


def deepspeed(task: Callable[[], tuple], stage: int) -> Step:
    alone()
    import deepspeed as peer

    model, x, y = task()
    settings = config(len(x), stage=stage)
    del settings["engine"]
    settings["optimizer"]["params"]["torch_adam"] = True
    trainer, *_ = peer.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return loop(trainer, x, y)


def accelerate(task: Callable[[], tuple], *, fused: bool | None = None) -> Step:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, x, y = task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        accelerator.backward(loss_fn(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fabric(task: Callable[[], tuple], *, fused: bool | None = None) -> Step:
    from lightning_fabric import Fabric

    runs = Fabric(accelerator="cpu", devices=1)
    model, x, y = task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    model, optimizer = runs.setup(model, optimizer)

    def step() -> None:
        runs.backward(loss_fn(model(x), y))
        runs.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def contenders() -> dict[str, Callable[[Callable[[], tuple]], Step]]:
    found = {
        "raw loop": partial(raw, fused=None),
        "raw loop, fused AdamW": partial(raw, fused=True),
        "forward and backward only": bound,
        "onecycle": ours,
        "onecycle, AdamW unfused": ours_unfused,
        "onecycle on DeepSpeed, stage 0": partial(ours, backend="deepspeed"),
        "onecycle on DeepSpeed, stage 2": partial(ours, backend="deepspeed", stage=2),
        "DeepSpeed, stage 0": partial(deepspeed, stage=0),
        "DeepSpeed, stage 2": partial(deepspeed, stage=2),
    }
    for name, module, make in (
        ("Accelerate", "accelerate", accelerate),
        ("Fabric", "lightning_fabric", fabric),
    ):
        if importlib.util.find_spec(module):
            found[name] = make
            found[f"{name}, fused AdamW"] = partial(make, fused=True)
    return found


def calls(step: Step, steps: int = 20) -> int:
    """Return the mean number of function calls that ``step`` makes, counted by cProfile."""
    for _ in range(3):
        step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(steps):
        step()
    profile.disable()
    return round(pstats.Stats(profile).total_calls / steps)


def cpu_time(step: Step, steps: int) -> float:
    begin = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - begin) / steps * 1e3


def serve(connection: Connection, make: Callable, task: Callable[[], tuple], counts: bool) -> None:
    """Run a contender's steps in this process, and send the measurements over the connection.

    First, send the number of function calls per step, or None if ``counts`` is false. Then, for
    each number received, run that many steps and send their mean CPU time. Return when the number
    is 0.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    step = make(task)
    torch.set_num_threads(1)  # after Accelerate, which changes the number
    cpu_time(step, 3)
    connection.send(calls(step) if counts else None)
    while steps := connection.recv():
        connection.send(cpu_time(step, steps))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    spawned = multiprocessing.get_context("spawn")
    console = Console()
    table = Table("CPU ms per step", title="relative to the raw loop (median)")
    cells: dict[str, list[str]] = {each: [] for each in contenders()}
    counts: dict[str, int] = {}
    for name, task, steps in (("MLP", mlp, 200), ("GPT, 10M", gpt, 4)):
        table.add_column(name, justify="right")
        ends: dict[str, Connection] = {}
        starting = track(contenders().items(), f"{name}: start", console=console, transient=True)
        for each, make in starting:
            ends[each], theirs = spawned.Pipe()
            of_it = (theirs, make, task, task is mlp)
            spawned.Process(target=serve, args=of_it, daemon=True).start()
            theirs.close()  # so that recv() raises EOFError if the contender fails
            counted = ends[each].recv()
            counts[each] = counts.get(each, counted)
        times: dict[str, list[float]] = {each: [] for each in ends}
        for _ in track(range(args.rounds), name, console=console, transient=True):
            for each, end in ends.items():
                end.send(steps)
                times[each].append(end.recv())
        for each, of_each in times.items():
            ends[each].send(0)
            ratios = (a / b for a, b in zip(of_each, times["raw loop"], strict=True))
            cell = f"{statistics.median(of_each):.3f} ({statistics.median(ratios):.2f}x)"
            cells[each].append(cell)
    table.add_column("calls (MLP)", justify="right")
    for each, row in cells.items():
        table.add_row(each, *row, str(counts[each]))
    console.print(table)


if __name__ == "__main__":
    main()

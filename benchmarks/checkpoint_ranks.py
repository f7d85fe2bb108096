"""Compare the time and memory that onecycle and other libraries need for sharded checkpoints.

    torchrun --standalone --nproc_per_node 2 benchmarks/checkpoint_ranks.py

The script prints one table for saving and one for loading. Each table shows the CPU time, summed
over the ranks, and the wall-clock time. It also shows the ratio of each time to that of a baseline,
in which every rank writes or reads the raw bytes of its shard. The column "memory" is the largest
increase in a rank's resident memory during the save or load (excluding memory-mapped files), as a
fraction of the size of the rank's tensors.

The contenders are onecycle with FSDP2 (stage 3 of the PyTorch backend),
torch.distributed.checkpoint (which computes no hashes), DeepSpeed (stages 0 and 2), and onecycle on
DeepSpeed (stages 0 and 2).
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import engine

WIDTH, LAYERS = 1024, 40
Work = Callable[[Path], object]


def build_engine(backend: str, stage: int) -> engine.Engine:
    """Train a 42-million-parameter model (0.5 GB of state) for one step, and return its engine."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "engine": {"backend": backend},
    }
    trainer, *_ = engine.initialize(config=config, model=model)
    trainer.backward(trainer(torch.randn(1, WIDTH)).pow(2).mean())
    trainer.step()
    return trainer


def read_resident_bytes() -> int:
    """Return the resident memory of this process in bytes, excluding memory-mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class PeakMemory:
    """Context manager that measures the largest increase of this process's resident memory."""

    def __enter__(self) -> Self:
        self.start = self.peak = read_resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, read_resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def increase(self) -> int:
        return self.peak - self.start


def measure(work: Work, path: Path) -> tuple[float, float, float]:
    """Call ``work(path)``, and return its CPU time, wall-clock time and memory increase.

    The times are in seconds; the CPU time is summed over all ranks. The memory increase is the
    largest of any rank, in bytes.
    """
    dist.barrier()
    with PeakMemory() as memory:
        starts = time.process_time(), time.perf_counter()
        work(path)
        cpu = torch.tensor([time.process_time() - starts[0]])
        dist.barrier()
        wall = time.perf_counter() - starts[1]
    dist.all_reduce(cpu)
    increase = torch.tensor([float(memory.increase)])
    dist.all_reduce(increase, dist.ReduceOp.MAX)
    return cpu.item(), wall, increase.item()


def build_contenders(
    buffer: memoryview, sharded: engine.Engine, replicas: dict[int, engine.Engine]
) -> dict[str, dict[str, tuple[str, Work]]]:
    rank = dist.get_rank()

    def save_dcp(path: Path) -> None:
        model, optimizer = get_state_dict(sharded.module, sharded.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path)

    def load_dcp(path: Path) -> None:
        model, optimizer = get_state_dict(sharded.module, sharded.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        set_state_dict(
            sharded.module,
            sharded.optimizer,
            model_state_dict=model,
            optim_state_dict=optimizer,
        )

    def read_shard(path: Path) -> None:
        with (path / str(rank)).open("rb") as file:
            file.readinto(buffer)

    def write_shard(path: Path) -> None:
        path.mkdir(exist_ok=True)
        (path / str(rank)).write_bytes(buffer)

    save: dict[str, tuple[str, Work]] = {
        "raw bytes of the shards": ("raw", write_shard),
        "torch.distributed.checkpoint": ("dcp", save_dcp),
        "onecycle, FSDP2": ("fsdp", lambda path: sharded.save_checkpoint(path, tag="t")),
    }
    load: dict[str, tuple[str, Work]] = {
        "raw bytes of the shards": ("raw", read_shard),
        "torch.distributed.checkpoint": ("dcp", load_dcp),
        "onecycle, FSDP2": ("fsdp", sharded.load_checkpoint),
    }
    for stage, trainer in replicas.items():
        inner: Any = trainer._backend.engine
        save[f"DeepSpeed, stage {stage}"] = (
            f"plain{stage}",
            lambda path, inner=inner: inner.save_checkpoint(path, tag="t"),
        )
        save[f"onecycle on DeepSpeed, stage {stage}"] = (
            f"ours{stage}",
            lambda path, trainer=trainer: trainer.save_checkpoint(path, tag="t"),
        )
        load[f"DeepSpeed, stage {stage}"] = (
            f"plain{stage}",
            lambda path, inner=inner: inner.load_checkpoint(path, tag="t"),
        )
        load[f"onecycle on DeepSpeed, stage {stage}"] = (f"ours{stage}", trainer.load_checkpoint)
    return {"save": save, "load": load}


def print_table(
    console: Console, title: str, results: dict[str, list[tuple[float, ...]]], shard: int
) -> None:
    table = Table(title, "CPU ms", "relative to first row", "wall ms", "relative", "memory")
    first = next(iter(results.values()))
    for name, each in results.items():
        cells = []
        for clock in range(2):
            ratio = statistics.median(a[clock] / b[clock] for a, b in zip(each, first, strict=True))
            middle = statistics.median(run[clock] for run in each)
            cells += [f"{middle * 1e3:.0f}", f"{ratio:.2f}x"]
        table.add_row(name, *cells, f"{max(run[2] for run in each) / shard:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sharded = build_engine("torch", 3)
    replicas = {stage: build_engine("deepspeed", stage) for stage in (0, 2)}
    parameters = sum(parameter.numel() for parameter in sharded.module.parameters())
    shard = parameters * 4 * 3 // dist.get_world_size()
    buffer = memoryview(bytearray(os.urandom(1 << 20) * (shard >> 20) + bytes(shard % (1 << 20))))
    paths = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(paths)
    directory = Path(paths[0])
    tables = build_contenders(buffer, sharded, replicas)
    results: dict[str, dict[str, list[tuple[float, ...]]]] = {
        title: {name: [] for name in contenders} for title, contenders in tables.items()
    }
    try:
        for number in range(args.rounds + 1):
            place = directory / str(number)
            place.mkdir(exist_ok=True)
            for title, contenders in tables.items():
                # The memory that a contender leaves to be reused is an advantage for the next one.
                order = list(contenders.items())[:: -1 if number % 2 else 1]
                for name, (path, work) in order:
                    measured = measure(work, place / path)
                    if number > 0:  # round 0 allocates memory and loads code
                        results[title][name].append(measured)
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(place)
            dist.barrier()
        if dist.get_rank() == 0:
            console = Console()
            for title, found in results.items():
                print_table(console, title, found, shard)
            console.print(f"{shard / 1e6:.1f} MB of tensors per rank")
    finally:
        dist.barrier()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()

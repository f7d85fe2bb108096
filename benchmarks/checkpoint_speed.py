"""Compare the cost of onecycle's checkpoints with that of raw I/O, torch.save and DeepSpeed.

    python benchmarks/checkpoint_speed.py

The script prints three tables: the cost of saving, the cost of loading, and how long an
asynchronous save blocks training. Each row shows the CPU time of the training thread, the
wall-clock time, and the ratio of each to the baseline. The first row is the baseline: the cost of
writing, reading or copying a single buffer of the same size. All numbers are medians of interleaved
rounds. A separate row shows the cost of syncing the saved files to disk and hashing the files.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import engine
from engine.checkpoint import state, storage
from engine.checkpoint.hashes import compute_hash

Contender = tuple[str, Callable[[Path], object]]
WIDTH, LAYERS = 1024, 40


def build_engine(backend: str, stage: int = 0, *, asynchronous: bool = False) -> engine.Engine:
    """Return an engine with 42 million parameters (0.5 GB of state), trained for one step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage},
        "engine": {"backend": backend, "checkpoint": {"async": asynchronous}},
    }
    trainer, *_ = engine.initialize(config=config, model=model)
    trainer.backward(trainer(torch.randn(2, WIDTH)).pow(2).mean())
    trainer.step()
    return trainer


def read_into(path: Path, memory: memoryview) -> None:
    with path.open("rb") as file:
        file.readinto(memory)


def measure(work: Callable[[Path], object], path: Path) -> tuple[float, float]:
    """Call ``work(path)``, and return its CPU time and wall-clock time in seconds."""
    starts = time.thread_time(), time.perf_counter()
    work(path)
    return time.thread_time() - starts[0], time.perf_counter() - starts[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    ours, deepspeed, sharded = (
        build_engine("torch"),
        build_engine("deepspeed"),
        build_engine("deepspeed", 1),
    )
    saver = build_engine("torch", asynchronous=True)
    states = (ours.module.state_dict(), ours.optimizer.state_dict())
    payload = sum(
        tensor.nbytes
        for group in (states[0].values(), *(s.values() for s in states[1]["state"].values()))
        for tensor in group
    )
    buffer = memoryview(
        bytearray(os.urandom(1 << 20) * (payload >> 20) + bytes(payload % (1 << 20)))
    )
    source, arena = (
        torch.frombuffer(buffer, dtype=torch.uint8).clone(),
        torch.zeros(payload, dtype=torch.uint8),
    )
    directory = Path(tempfile.mkdtemp())

    def get_deepspeed_engine(trainer: engine.Engine) -> Any:
        return trainer._backend.engine

    def write_tensors(path: Path) -> None:
        path.mkdir()
        state.write(path, ours.module, ours.optimizer)

    def sync_and_hash(path: Path) -> None:
        for file in (path.parent / "tensors").iterdir():
            storage._sync(file)
            compute_hash(file)

    def read_tensors(path: Path) -> None:
        state.read(path.parent / "tensors", ours.module, ours.optimizer, strict=True)

    saver.save_checkpoint(directory / "first", tag="t")  # allocates the memory for its copy
    saver.wait_for_checkpoint()
    allocated = saver._checkpointer.async_saver.buffers
    # Each contender writes to a new path. Removing the files is not measured.
    tables: dict[str, dict[str, Contender]] = {
        "save": {
            "raw bytes": ("raw", lambda path: path.write_bytes(buffer)),
            "torch.save": ("torch", lambda path: torch.save(states, path)),
            "onecycle, tensors only": ("tensors", write_tensors),
            "onecycle, syncing and hashing": ("synced", sync_and_hash),
            "onecycle, total": ("ours", lambda path: ours.save_checkpoint(path, tag="t")),
            "DeepSpeed, stage 0": (
                "stage0",
                lambda path: get_deepspeed_engine(deepspeed).save_checkpoint(path, tag="t"),
            ),
            "DeepSpeed, stage 1": (
                "stage1",
                lambda path: get_deepspeed_engine(sharded).save_checkpoint(path, tag="t"),
            ),
        },
        "load": {
            "raw bytes": ("raw", lambda path: read_into(path, buffer)),
            "torch.load": ("torch", lambda path: torch.load(path, weights_only=True)),
            "onecycle, tensors only": ("reading", read_tensors),
            "onecycle, total": ("ours", ours.load_checkpoint),
            "DeepSpeed, stage 0": (
                "stage0",
                lambda path: get_deepspeed_engine(deepspeed).load_checkpoint(path, tag="t"),
            ),
            "DeepSpeed, stage 1": (
                "stage1",
                lambda path: get_deepspeed_engine(sharded).load_checkpoint(path, tag="t"),
            ),
        },
        "wait": {
            "one memcpy into allocated memory": ("memcpy", lambda _: arena.copy_(source)),
            "onecycle, copying": (
                "copy",
                lambda _: state.copy_to_host(
                    state._get_state(saver.module, saver.optimizer, frozen=True), allocated
                ),
            ),
            "onecycle, async": (
                "asynchronous",
                lambda path: saver.save_checkpoint(path, tag="t"),
            ),
        },
    }
    console = Console()
    try:
        times = {title: {name: [] for name in of} for title, of in tables.items()}
        for number in track(range(args.rounds), console=console, transient=True):
            place = directory / str(number)
            place.mkdir()
            for title, contenders in tables.items():
                for name, (path, work) in contenders.items():
                    times[title][name].append(measure(work, place / path))
                    saver.wait_for_checkpoint()
            size = sum(path.stat().st_size for path in (place / "tensors").iterdir())
            shutil.rmtree(place)
        for title, contender_times in times.items():
            table = Table(title, "CPU ms", "relative to first row", "wall ms", "relative")
            first = next(iter(contender_times.values()))
            for name, each in contender_times.items():
                cells = []
                for clock in range(2):
                    pairs = zip(each, first, strict=True)
                    ratio = statistics.median(a[clock] / b[clock] for a, b in pairs)
                    middle = statistics.median(seconds[clock] for seconds in each)
                    cells += [f"{middle * 1e3:.0f}", f"{ratio:.2f}x"]
                table.add_row(name, *cells)
            console.print(table)
        console.print(
            f"tensors: {payload / 1e6:.1f} MB in memory, {size / 1e6:.1f} MB on disk "
            f"({size / payload:.4f}x)"
        )
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()

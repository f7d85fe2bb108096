"""Compare the cost of saving and loading a checkpoint with raw bytes, torch.save and DeepSpeed.

    python benchmarks/checkpoint_speed.py

Prints the CPU time of the training thread (medians of interleaved rounds) and its ratio to
writing, reading or copying the same number of bytes from one buffer. Hashing and syncing, which
verify that a checkpoint is complete, have a separate row. The third table shows how long training
waits for an asynchronous save.
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

Contender = tuple[str, Callable[[Path], object]]
WIDTH, LAYERS = 1024, 40


def trained(backend: str, stage: int = 0, *, behind: bool = False) -> engine.Engine:
    """Return an engine with a model of 42 million parameters and its Adam states: 0.5 GB."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage},
        "engine": {"backend": backend, "checkpoint": {"async": behind}},
    }
    trainer, *_ = engine.initialize(config=config, model=model)
    trainer.backward(trainer(torch.randn(2, WIDTH)).pow(2).mean())
    trainer.step()
    return trainer


def read_into(path: Path, memory: memoryview) -> None:
    with path.open("rb") as file:
        file.readinto(memory)


def cpu_time(work: Callable[[Path], object], place: Path) -> float:
    begin = time.thread_time()
    work(place)
    return time.thread_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    ours, deepspeed, divided = trained("torch"), trained("deepspeed"), trained("deepspeed", 1)
    behind = trained("torch", behind=True)
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
    folder = Path(tempfile.mkdtemp())

    def theirs(trainer: engine.Engine) -> Any:
        return trainer._backend.engine

    def write_tensors(place: Path) -> None:
        place.mkdir()
        state.write(place, ours.module, ours.optimizer)

    def prove(place: Path) -> None:
        for path in (place.parent / "tensors").iterdir():
            storage._sync(path)
            storage._hash(path)

    def read_tensors(place: Path) -> None:
        state.read(place.parent / "tensors", ours.module, ours.optimizer, strict=True)

    behind.save_checkpoint(folder / "first", tag="t")  # allocates the memory for its copy
    behind.wait_for_checkpoint()
    held = behind._checkpointer.async_saver.buffers
    # Each contender writes to a new path. Removing the files is not measured.
    tables: dict[str, dict[str, Contender]] = {
        "save": {
            "raw bytes": ("raw", lambda place: place.write_bytes(buffer)),
            "torch.save": ("torch", lambda place: torch.save(states, place)),
            "onecycle, tensors only": ("tensors", write_tensors),
            "onecycle, syncing and hashing": ("proof", prove),
            "onecycle, total": ("ours", lambda place: ours.save_checkpoint(place, tag="t")),
            "DeepSpeed, stage 0": (
                "stage0",
                lambda place: theirs(deepspeed).save_checkpoint(place, tag="t"),
            ),
            "DeepSpeed, stage 1": (
                "stage1",
                lambda place: theirs(divided).save_checkpoint(place, tag="t"),
            ),
        },
        "load": {
            "raw bytes": ("raw", lambda place: read_into(place, buffer)),
            "torch.load": ("torch", lambda place: torch.load(place, weights_only=True)),
            "onecycle, tensors only": ("reading", read_tensors),
            "onecycle, total": ("ours", ours.load_checkpoint),
            "DeepSpeed, stage 0": (
                "stage0",
                lambda place: theirs(deepspeed).load_checkpoint(place, tag="t"),
            ),
            "DeepSpeed, stage 1": (
                "stage1",
                lambda place: theirs(divided).load_checkpoint(place, tag="t"),
            ),
        },
        "wait": {
            "one memcpy into allocated memory": ("memcpy", lambda _: arena.copy_(source)),
            "onecycle, copying": (
                "copy",
                lambda _: state._copy_to_host(
                    state._get_state(behind.module, behind.optimizer), held
                ),
            ),
            "onecycle, async": ("behind", lambda place: behind.save_checkpoint(place, tag="t")),
        },
    }
    console = Console()
    try:
        times = {title: {name: [] for name in of} for title, of in tables.items()}
        for _ in track(range(args.rounds), console=console, transient=True):
            for title, contenders in tables.items():
                for name, (place, work) in contenders.items():
                    times[title][name].append(cpu_time(work, folder / place))
                    behind.wait_for_checkpoint()
            size = sum(path.stat().st_size for path in (folder / "tensors").iterdir())
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for title, of_title in times.items():
            table = Table(title, "CPU ms", "times the first")
            first = next(iter(of_title.values()))
            for name, each in of_title.items():
                ratio = statistics.median(a / b for a, b in zip(each, first, strict=True))
                table.add_row(name, f"{statistics.median(each) * 1e3:.0f}", f"{ratio:.2f}x")
            console.print(table)
        console.print(f"{payload / 1e6:.1f} MB of tensors; {size / payload:.4f} times that on disk")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""Cost of saving and loading a checkpoint, beside raw bytes, torch.save and DeepSpeed, in one run.

    python benchmarks/checkpoint_speed.py

CPU time of one process, medians of interleaved rounds, times writing (or reading) the same bytes
from one buffer. Hashing and syncing, which make a checkpoint provably whole, are counted apart.
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

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import engine
from engine.checkpoint import envelope, tensors

WIDTH, LAYERS = 1024, 16


def trained(backend: str) -> engine.Engine:
    """Return an engine of a model with Adam's states: 16.8 million parameters, 201 MB."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW"},
        "engine": {"backend": backend},
    }
    trainer, *_ = engine.initialize(config=config, model=model)
    trainer.backward(trainer(torch.randn(2, WIDTH)).pow(2).mean())
    trainer.step()
    return trainer


def cpu_time(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    ours, deepspeed = trained("torch"), trained("deepspeed")
    states = (ours.module.state_dict(), ours.optimizer.state_dict())
    payload = sum(
        tensor.nbytes
        for group in (states[0].values(), *(s.values() for s in states[1]["state"].values()))
        for tensor in group
    )
    buffer = memoryview(os.urandom(1 << 20) * (payload >> 20) + bytes(payload % (1 << 20)))
    folder = Path(tempfile.mkdtemp())

    def shares() -> Path:
        place = folder / "shares"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        tensors.write(place, ours.module, ours.optimizer)
        return place

    def hashes() -> None:
        for path in (folder / "shares").iterdir():
            envelope._hash(path)
            envelope._sync(path)

    saves: dict[str, Callable[[], object]] = {
        "raw bytes": lambda: (folder / "raw").write_bytes(buffer),
        "torch.save": lambda: torch.save(states, folder / "torch.pt"),
        "onecycle, the tensors": shares,
        "onecycle, hashing and syncing": hashes,
        "onecycle, the whole checkpoint": lambda: ours.save_checkpoint(folder / "ours", tag="t"),
        "DeepSpeed": lambda: deepspeed._backend.engine.save_checkpoint(str(folder / "ds"), tag="t"),
    }
    loads: dict[str, Callable[[], object]] = {
        "raw bytes": (folder / "raw").read_bytes,
        "torch.load": lambda: torch.load(folder / "torch.pt", weights_only=True),
        "onecycle, the tensors": lambda: tensors.read(
            folder / "shares", ours.module, ours.optimizer, strict=True
        ),
        "onecycle, the whole checkpoint": lambda: ours.load_checkpoint(folder / "ours"),
        "DeepSpeed": lambda: deepspeed._backend.engine.load_checkpoint(str(folder / "ds"), tag="t"),
    }
    console = Console()
    try:
        for title, contenders in (("save", saves), ("load", loads)):
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in track(range(args.rounds), title, console=console, transient=True):
                for name, work in contenders.items():
                    times[name].append(cpu_time(work))
            table = Table(title, "CPU ms", "times raw bytes")
            for name, each in times.items():
                raw = times["raw bytes"]
                ratio = statistics.median(a / b for a, b in zip(each, raw, strict=True))
                table.add_row(name, f"{statistics.median(each) * 1e3:.0f}", f"{ratio:.2f}x")
            console.print(table)
        size = sum(path.stat().st_size for path in (folder / "shares").iterdir())
        console.print(f"{payload / 1e6:.1f} MB of tensors; on disk {size / payload:.4f} times that")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

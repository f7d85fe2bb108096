"""Damage checkpoints and saves in every known way; print the error message and the recovery.

    python benchmarks/fault_table.py

Each fault is real: the full file system is a mounted one of 2 MB (which requires root; without it
the row is omitted), the killed rank gets SIGKILL. The last column is the newest step from which a
new run resumes. Three checkpoints exist before each fault, the last one of step 6 (before the
faults that need several ranks: one, of step 2).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine
from engine.checkpoint import collectives, storage
from tests.engine.checkpoint.test_checkpoint import Bomb, damage
from tests.engine.test_initialization import model, start, train

IN_FILES = (
    "a truncated shard",
    "a flipped byte",
    "a missing file",
    "no manifest",
    "a broken manifest",
    "a writer that died",
)


def saved(folder: Path) -> Path:
    trainer, loader = start()
    for _ in range(3):
        train(trainer, loader, 2)
        trainer.save_checkpoint(folder)
    return folder


def said(call: Callable[[], Any]) -> str:
    """Return the first line of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return str(error).splitlines()[0]
    return "(nothing)"


def newest(folder: Path) -> str:
    fresh, _ = start()
    fresh.load_checkpoint(folder)
    return f"step {fresh.global_steps}"


@contextmanager
def small_file_system(folder: Path) -> Iterator[Path | None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False)


def in_files(folder: Path) -> Iterator[tuple[str, str, str]]:
    for number, fault in enumerate(IN_FILES):
        place = saved(folder / str(number))
        damage(place, fault)
        message = said(lambda p=place: start()[0].load_checkpoint(p, tag="global_step6"))
        yield fault, message, newest(place)
    for fault in ("no latest", "an empty latest", "a dangling latest"):
        place = saved(folder / fault.replace(" ", "_"))
        damage(place, fault)
        yield fault, said(lambda p=place: start()[0].load_checkpoint(p)), newest(place)


def of_the_model(folder: Path) -> Iterator[tuple[str, str, str]]:
    place = saved(folder / "model")
    net = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))
    kept = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    kept["engine"] = {"checkpoint": {"override": True}}
    other, *_ = engine.initialize(config=kept, model=net)
    yield (
        "a checkpoint of another model",
        said(lambda: other.load_checkpoint(place)),
        newest(place),
    )
    bomb = saved(folder / "bomb")
    target = bomb / "global_step6" / "engine.pt"
    torch.save(Bomb(), target)
    manifest = json.loads((bomb / "global_step6" / "manifest.json").read_text())
    size, digest = target.stat().st_size, storage._hash(target)
    manifest["files"]["engine.pt"] = {"size": size, "sha256": digest}
    (bomb / "global_step6" / "manifest.json").write_text(json.dumps(manifest))
    yield (
        "a pickle bomb with a correct hash",
        said(lambda: start()[0].load_checkpoint(bomb)),
        "step 4, by its tag",
    )


def in_saving(folder: Path) -> Iterator[tuple[str, str, str]]:
    place = saved(folder / "tag")
    trainer, loader = start()
    trainer.load_checkpoint(place)
    yield (
        "a tag that exists",
        said(lambda: trainer.save_checkpoint(place, tag="global_step6"))
        + " replaced when complete",
        newest(place),
    )
    blocked = folder / "file"
    blocked.write_text("")
    yield "a directory that cannot be created", said(lambda: trainer.save_checkpoint(blocked)), "-"
    with small_file_system(folder / "small") as small:
        if small is None:
            return
        kept = saved(small)
        filler = small / "filler"
        free = shutil.disk_usage(small).free
        filler.write_bytes(bytes(free - 4096))
        train(trainer, loader, 1)
        message = said(lambda: trainer.save_checkpoint(kept))
        filler.unlink()
        yield "no space", message, newest(kept)


def of_ranks(folder: Path) -> Iterator[tuple[str, str, str]]:
    for case, fault in (("absent", "a save on rank 0 only"), ("dead", "a rank that was killed")):
        begin = time.monotonic()
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        place = folder / case
        done = subprocess.run(
            [sys.executable, *command, __file__, "--as-rank", case, str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [
            line for line in done.stderr.splitlines() if "must be called on every rank" in line
        ]
        message = lines[0].split(": ", 1)[1][:170] if lines else done.stderr[-300:]
        spent = time.monotonic() - begin
        yield f"{fault} ({spent:.0f} s including startup)", f"{message} …", "step 2"


def as_rank(case: str, folder: str) -> None:
    collectives._TIMEOUT = timedelta(seconds=5)
    config = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}}
    trainer, *_ = engine.initialize(config=config, model=model())
    trainer.backward(trainer(torch.ones(2, 4)).mean())
    trainer.step()
    trainer.save_checkpoint(folder)
    if trainer.global_rank == 1:
        if case == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)
        return
    trainer.save_checkpoint(folder, tag="next")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--as-rank", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        as_rank(*args.as_rank)
        return
    console = Console(soft_wrap=True)
    print("| fault | message | a new run resumes from |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rows in (in_files, of_the_model, in_saving, of_ranks):
            for row in rows(folder):
                shown = [cell.replace(str(folder), "…").replace("|", "\\|") for cell in row]
                console.print(f"| {' | '.join(shown)} |", markup=False, highlight=False)


if __name__ == "__main__":
    main()

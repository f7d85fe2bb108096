"""Inject faults into checkpoints, saves and whole programs, and print the outcomes in two tables.

    python benchmarks/fault_table.py [--only TEXT]

The first table lists faults in checkpoints and saves. It shows the error message, and the step from
which training resumes afterward. Before most faults, three checkpoints exist, the newest at step 6.
Before a fault that needs several ranks, only one checkpoint exists, at step 1. The second table
lists the faults that are defined in benchmarks/fault_runs.py.

All faults are real, except for the change of the system clock, which is simulated. A full disk, for
example, is a small tmpfs. If no tmpfs can be mounted, the faults that need a tmpfs are skipped.
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
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine
from benchmarks.fault_runs import run_faults
from engine.checkpoint import storage
from engine.checkpoint.hashes import describe_files
from tests.engine.checkpoint.test_checkpoint import Bomb, damage
from tests.engine.test_initialization import model, start, train

FILE_FAULTS = (
    "a truncated shard",
    "a flipped byte",
    "a missing file",
    "no manifest",
    "a broken manifest",
    "a writer that died",
)


def save_checkpoints(directory: Path) -> Path:
    trainer, loader = start()
    for _ in range(3):
        train(trainer, loader, 2)
        trainer.save_checkpoint(directory)
    return directory


def get_error(call: Callable[[], Any]) -> str:
    """Return the first line of the error that a call raises, or "(nothing)" if it succeeds."""
    try:
        call()
    except Exception as error:
        return str(error).splitlines()[0]
    return "(nothing)"


def find_resumed_step(directory: Path) -> str:
    fresh, _ = start()
    fresh.load_checkpoint(directory)
    return f"step {fresh.global_steps}"


@contextmanager
def mount_small_file_system(directory: Path) -> Iterator[Path | None]:
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        yield directory if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], check=False)


def damage_files(directory: Path) -> Iterator[tuple[str, str, str]]:
    for number, fault in enumerate(FILE_FAULTS):
        saved_dir = save_checkpoints(directory / str(number))
        damage(saved_dir, fault)
        message = get_error(lambda p=saved_dir: start()[0].load_checkpoint(p, tag="global_step6"))
        yield fault, message, find_resumed_step(saved_dir)
    for fault in ("no latest", "an empty latest", "a dangling latest"):
        saved_dir = save_checkpoints(directory / fault.replace(" ", "_"))
        damage(saved_dir, fault)
        yield (
            fault,
            get_error(lambda p=saved_dir: start()[0].load_checkpoint(p)),
            find_resumed_step(saved_dir),
        )


def replace_model(directory: Path) -> Iterator[tuple[str, str, str]]:
    saved_dir = save_checkpoints(directory / "model")
    net = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))
    kept = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    kept["engine"] = {"checkpoint": {"override": True}}
    other, *_ = engine.initialize(config=kept, model=net)
    yield (
        "a checkpoint of another model",
        get_error(lambda: other.load_checkpoint(saved_dir)),
        find_resumed_step(saved_dir),
    )
    bomb = save_checkpoints(directory / "bomb")
    target = bomb / "global_step6" / "engine.pt"
    torch.save(Bomb(), target)
    manifest = json.loads((bomb / "global_step6" / "manifest.json").read_text())
    manifest["files"] |= describe_files([target], target.parent)
    del manifest["checksum"]
    (bomb / "global_step6" / "manifest.json").write_text(json.dumps(manifest))
    yield (
        "a pickle bomb with a correct hash",
        get_error(lambda: start()[0].load_checkpoint(bomb)),
        'step 4, with `tag="global_step4"`',
    )


def fail_to_save(directory: Path) -> Iterator[tuple[str, str, str]]:
    saved_dir = save_checkpoints(directory / "tag")
    trainer, loader = start()
    trainer.load_checkpoint(saved_dir)
    yield (
        "a tag that exists",
        get_error(lambda: trainer.save_checkpoint(saved_dir, tag="global_step6"))
        + "; the new checkpoint replaces the old one when it is complete",
        find_resumed_step(saved_dir),
    )
    blocked = directory / "file"
    blocked.write_text("")
    yield (
        "a directory that cannot be created",
        get_error(lambda: trainer.save_checkpoint(blocked)),
        "-",
    )
    with mount_small_file_system(directory / "small") as small:
        if small is None:
            yield "no space", "SKIPPED: a tmpfs cannot be mounted", "-"
            return
        kept = save_checkpoints(small)
        filler = small / "filler"
        free = shutil.disk_usage(small).free
        filler.write_bytes(bytes(free - 4096))
        train(trainer, loader, 1)
        message = get_error(lambda: trainer.save_checkpoint(kept))
        filler.unlink()
        yield "no space", message, find_resumed_step(kept)


def fail_on_rank(directory: Path) -> Iterator[tuple[str, str, str]]:
    for case, fault in (("absent", "a save on rank 0 only"), ("dead", "a rank that was killed")):
        start_time = time.monotonic()
        saved_dir = directory / case
        command = ["-m", "engine.cli.main", "launch", "--no-preflight", "--nproc", "2"]
        command += ["--timeout", "10"]  # seconds; the default is ten minutes
        done = subprocess.run(
            [sys.executable, *command, __file__, "--as-rank", case, str(saved_dir)],
            capture_output=True,
            text=True,
            check=False,
        )
        known = ("RuntimeError: save_checkpoint(", "first failure")
        lines = [line for line in done.stderr.splitlines() if any(text in line for text in known)]
        message = lines[0].split(": ", 1)[1][:170] if lines else done.stderr[-300:]
        spent = time.monotonic() - start_time
        _, newest = storage.list_checkpoints(saved_dir)[-1]
        yield f"{fault} ({spent:.0f} s including startup)", f"{message} …", f"step {newest.step}"


def run_rank(case: str, directory: str) -> None:
    config = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}}
    trainer, *_ = engine.initialize(config=config, model=model())
    trainer.backward(trainer(torch.ones(2, 4)).mean())
    trainer.step()
    trainer.save_checkpoint(directory)
    if trainer.global_rank == 1:
        if case == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(20)  # longer than the timeout of rank 0
        return
    trainer.save_checkpoint(directory, tag="next")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--as-rank", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument(
        "--only",
        metavar="TEXT",
        help="print only the second table, limited to faults whose names contain TEXT",
    )
    args = parser.parse_args()
    if args.as_rank:
        run_rank(*args.as_rank)
        return
    console = Console(soft_wrap=True)
    if args.only is None:
        print_checkpoint_faults(console)
    print("\n| fault | last line of the output | status | seconds |\n|---|---|---|---|")
    for fault, said, status, seconds in run_faults(args.only or ""):
        cells = (fault, said.replace("|", "\\|"), str(status), f"{seconds:.0f}")
        console.print(f"| {' | '.join(cells)} |", markup=False, highlight=False)


def print_checkpoint_faults(console: Console) -> None:
    print("| fault | message | a new run resumes from |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for rows in (damage_files, replace_model, fail_to_save, fail_on_rank):
            for row in rows(directory):
                shown = [cell.replace(str(directory), "…").replace("|", "\\|") for cell in row]
                console.print(f"| {' | '.join(shown)} |", markup=False, highlight=False)


if __name__ == "__main__":
    main()

"""``onecycle checkpoint``: what checkpoints are there, whether they are whole, what is in them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TextIO

from engine.checkpoint import storage
from engine.cli.commands.arguments import INVALID, OK
from engine.errors import CheckpointError

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Look at the checkpoints of a run: list them (ls), prove all hashes (verify), print what "
        "one says of itself (show), or write its weights as one safetensors file (export). All but "
        "export need no torch."
    )
    parser.add_argument("action", choices=["ls", "verify", "show", "export"])
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder of the run's checkpoints")
    parser.add_argument("--tag", help="which one (default: all for verify, else the newest)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="for export: where to write (default: TAG.safetensors in this folder)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Do what is asked for."""
    actions = {"ls": _list, "verify": _verify, "show": _show, "export": _export}
    return actions[args.action](args, out)


def _list(args: argparse.Namespace, out: TextIO) -> int:
    whole = storage.checkpoints(args.dir)
    if not whole:
        raise FileNotFoundError(2, "holds no complete checkpoint", str(args.dir))
    width = max(len(place.name) for place, _ in whole)
    for place, manifest in whole:
        ranks = f"{manifest.world_size} rank{'s' * (manifest.world_size > 1)}"
        size = f"{manifest.size / 2**20:,.1f} MiB"
        row = (f"{place.name:{width}}", f"update {manifest.step}", manifest.backend, ranks, size)
        part = () if manifest.frozen else ("without frozen parameters",)
        print("  ".join((*row, manifest.created[:19], *part)), file=out)
    return OK


def _verify(args: argparse.Namespace, out: TextIO) -> int:
    tags = [args.tag] if args.tag else _tags(args.dir)
    if not tags:
        raise FileNotFoundError(2, "holds no checkpoint", str(args.dir))
    status = OK
    for tag in tags:
        try:
            manifest = storage.read_manifest(args.dir / tag)
            wrong = list(storage.faults(args.dir / tag, manifest))
        except CheckpointError as error:
            wrong = [str(error)]
        print(f"{tag}: {'; '.join(wrong) if wrong else 'whole'}", file=out)
        status = INVALID if wrong else status
    return status


def _tags(folder: Path) -> list[str]:
    places = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        place.name for place in places if place.is_dir() and not place.name.startswith(".")
    )


def _show(args: argparse.Namespace, out: TextIO) -> int:
    place, manifest = storage.find(args.dir, args.tag)
    shown = {**vars(manifest), "place": str(place), "size": manifest.size}
    print(json.dumps(shown, indent=2), file=out)
    return OK


def _export(args: argparse.Namespace, out: TextIO) -> int:
    place, manifest = storage.find(args.dir, args.tag)
    if manifest.backend != "torch":
        raise ValueError(
            f"export must be of a checkpoint of the PyTorch backend, but {place} is of "
            f"{manifest.backend}; use DeepSpeed's zero_to_fp32.py, which lies in it."
        )
    from engine.checkpoint.state import export

    path = args.output or Path(f"{place.name}.safetensors")
    count, size = export(place, path)
    print(f"{path}: {count:,} tensors, {size / 2**20:,.1f} MiB", file=out)
    return OK

"""``onecycle checkpoint``: list, verify, show and export the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TextIO

from engine.checkpoint import storage
from engine.checkpoint.manifest import MANIFEST, read_manifest
from engine.cli.commands.arguments import add_examples
from engine.config.wording import count_noun
from engine.display.terminal import format_rows, get_width
from engine.distributed.environment import INVALID, OK
from engine.errors import CheckpointError, escape

__all__ = ["add_arguments", "run"]

_HINT = "Pass the checkpoint directory of a run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle checkpoint`` to a parser."""
    parser.description = (
        "List the checkpoints of a run (ls), verify their hashes (verify), print the manifest of a "
        "checkpoint (show), or export its weights to one safetensors file (export). Only "
        "export requires torch. It also accepts DeepSpeed checkpoints."
    )
    add_examples(
        parser,
        "onecycle checkpoint ls checkpoints",
        "onecycle checkpoint verify checkpoints",
        "onecycle checkpoint export checkpoints -o weights.safetensors",
    )
    parser.add_argument(
        "action",
        type=str.lower,
        choices=["ls", "verify", "show", "export"],
        help="action to perform on the checkpoints",
    )
    parser.add_argument(
        "dir",
        metavar="DIR",
        type=Path,
        help="checkpoint directory of the run. All actions except ls also accept the directory of "
        "a single checkpoint",
    )
    parser.add_argument(
        "--tag",
        help="tag of the checkpoint (default: the newest checkpoint; for verify, all checkpoints)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="output file of export (default: TAG.safetensors in the current directory)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """List, verify, show or export checkpoints, and return the exit status."""
    if args.action == "ls":
        return _list(args, out)
    if args.tag is None and storage.is_checkpoint(args.dir):
        path = args.dir.absolute()
        args.dir, args.tag = path.parent, path.name
    return {"verify": _verify, "show": _show, "export": _export}[args.action](args, out)


def _list(args: argparse.Namespace, out: TextIO) -> int:
    complete = storage.list_checkpoints(args.dir)
    if not complete:
        raise FileNotFoundError(
            2,
            "the directory contains no complete checkpoint; pass the checkpoint directory of a run",
            str(args.dir),
        )
    rows = []
    for path, manifest in complete:
        ranks = count_noun(manifest.world_size, "rank")
        size = f"{manifest.size / 2**20:,.1f} MiB"
        notes = [manifest.created[:19]]
        if manifest.best is not None and manifest.best["step"] == manifest.step:
            notes.append(f"best {manifest.best['metric']} so far: {manifest.best['value']:.6g}")
        if not manifest.frozen:
            notes.append("without frozen parameters")
        row = (path.name, f"step {manifest.step}", manifest.backend, ranks, size)
        rows.append(tuple(map(escape, (*row, "  ".join(notes)))))
    for line in format_rows(rows, get_width(out)):
        print(line, file=out)
    return OK


def _verify(args: argparse.Namespace, out: TextIO) -> int:
    tags = [args.tag] if args.tag else _list_tags(args.dir)
    if not tags:
        raise FileNotFoundError(
            2,
            "the directory contains no checkpoint; pass the checkpoint directory of a run",
            str(args.dir),
        )
    status = OK
    for tag in tags:
        try:
            manifest = read_manifest(args.dir / tag)
            problems = list(storage.find_damage(args.dir / tag, manifest))
        except CheckpointError as error:
            problems = [str(error)]
        print(escape(f"{tag}: {'; '.join(problems) if problems else 'valid'}"), file=out)
        status = INVALID if problems else status
    return status


def _list_tags(directory: Path) -> list[str]:
    """Return the tags of all checkpoints in a directory, including damaged ones."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(
        path.name
        for path in paths
        if path.is_dir() and not path.name.startswith(".") and _has_checkpoint_file(path)
    )


def _has_checkpoint_file(directory: Path) -> bool:
    patterns = (MANIFEST, "*.pt", "*.safetensors")
    return any(any(directory.glob(pattern)) for pattern in patterns)


def _show(args: argparse.Namespace, out: TextIO) -> int:
    path, manifest = storage.find(args.dir, args.tag, _HINT)
    fields = {**vars(manifest), "path": str(path), "size": manifest.size}
    print(json.dumps(fields, indent=2), file=out)
    return OK


def _export(args: argparse.Namespace, out: TextIO) -> int:
    from engine.checkpoint.selection import find_foreign
    from engine.checkpoint.state import export

    path = find_foreign(args.dir, args.tag) or storage.find(args.dir, args.tag, _HINT)[0]
    output = args.output or Path(f"{path.name}.safetensors")
    if not output.parent.is_dir():
        raise FileNotFoundError(
            2, "the directory of the output file does not exist; create it", str(output)
        )
    if os.path.lexists(output):
        raise FileExistsError(
            17, "the output file already exists; delete it or choose another name", str(output)
        )
    partial = output.with_name(f".{output.name}.partial")
    try:
        count, size = export(path, partial)
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{output}: {count:,} tensors, {size / 2**20:,.1f} MiB", file=out)
    return OK

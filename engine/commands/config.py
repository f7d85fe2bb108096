"""``onecycle config``: every value that a run would use, and where it comes from."""

from __future__ import annotations

import argparse
import json
from typing import TextIO

from engine.commands.arguments import OK, positive

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Print the resolved config: every value that a run would use, from the file, "
        "by default, or derived."
    )
    parser.add_argument("file", metavar="FILE", help="a ds_config.json; - for stdin")
    parser.add_argument(
        "--world-size", type=positive, default=1, metavar="N", help="number of ranks (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print it as a config of its own")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the values and their origins."""
    from engine.config import ConfigError, load_document
    from engine.config.check import check
    from engine.config.origins import as_config, origins

    document = load_document(args.file)
    errors = [each for each in check(document, args.world_size) if each.severity == "error"]
    if errors:
        raise ConfigError(document.name, errors)
    entries = list(origins(document, args.world_size))
    if args.json:
        print(json.dumps(as_config(entries), indent=2), file=out)
        return OK
    width = max(len(entry.name) for entry in entries)
    shown = [json.dumps(entry.value) for entry in entries]
    value_width = min(40, max(map(len, shown)))
    for entry, value in zip(entries, shown, strict=True):
        print(f"{entry.name:{width}}  {value:{value_width}}  {entry.origin}", file=out)
    return OK

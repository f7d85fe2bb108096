"""``onecycle schema``: print the JSON Schema of configs, or of one schedule's params."""

from __future__ import annotations

import argparse
import json
from typing import TextIO

from engine.cli.commands.arguments import add_examples, find_schedule
from engine.distributed.environment import OK

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle schema`` to a parser."""
    parser.description = (
        "Print the JSON Schema (draft 2020-12) of configs. With TYPE, print the schema of that "
        "schedule's `params`."
    )
    parser.add_argument("type", metavar="TYPE", nargs="?", help="schedule type, such as OneCycle")
    add_examples(
        parser,
        "onecycle schema OneCycle",
        "onecycle schema --editor > ds_config.draft-07.json",
    )
    parser.add_argument(
        "--editor",
        action="store_true",
        help="print a self-contained draft-07 schema for editors. To get completion and "
        "documentation in an editor, save the schema as ds_config.draft-07.json next to the "
        'config, and add "$schema": "./ds_config.draft-07.json" to the config',
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the JSON Schema of configs or of one schedule's params, and return the exit status."""
    import schemas
    from engine.config.schema import SCHEMA, schedule_schema

    schema = schemas.read(schemas.EDITOR if args.editor else SCHEMA)
    if args.type:
        schema = schedule_schema(find_schedule(args.type))
    print(json.dumps(schema, indent=2), file=out)
    return OK

"""``onecycle ui``: open a local web page for editing a config or viewing runs."""

from __future__ import annotations

import argparse
import contextlib
import gc
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from engine.cli.commands.arguments import add_examples
from engine.distributed.environment import OK
from engine.errors import escape
from schedules.core.extras import require_package

if TYPE_CHECKING:
    from engine.ui.server import Page

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle ui`` to a parser."""
    parser.description = (
        "Open a web page for editing a config, or for viewing the metrics and checkpoints of runs. "
        "As you edit a config, the page shows its problems and curves. The page is available only "
        "on this machine. It accesses only the files and directories given on the command line."
    )
    parser.add_argument(
        "paths",
        metavar="FILE|DIR",
        nargs="*",
        default=["ds_config.json"],
        help="config file to edit, or directories to search for runs (default: ds_config.json). A "
        "missing config file is created when you save",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=0,
        metavar="N",
        help="port to serve the web page on (default: any free port)",
    )
    parser.add_argument(
        "--no-browser",
        action="store_true",
        help="print the address of the web page, but do not open a browser",
    )
    add_examples(
        parser,
        "onecycle ui ds_config.json",
        "onecycle ui runs/first runs/second",
        "onecycle ui ds_config.json --no-browser --port 8000",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Serve the web page until the user presses Ctrl+C, and return the exit status."""
    require_package("werkzeug", "`onecycle ui`")
    from engine.ui.server import start_server

    server, address = start_server(_choose_page([Path(path) for path in args.paths]), args.port)
    shown = escape(", ".join(args.paths))
    print(f"{shown}: {address}\nPress Ctrl+C to stop.", file=out, flush=True)
    if not args.no_browser:
        webbrowser.open(address)
    gc.enable()  # The command line disables garbage collection, but the server runs for hours.
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return OK


def _choose_page(paths: list[Path]) -> Page:
    from engine.ui.config_file import ConfigFile
    from engine.ui.config_page import TEMPLATE, ConfigPage

    if all(path.is_dir() for path in paths):
        from engine.ui.run_page import RunPage

        return RunPage(paths)
    if len(paths) > 1:
        raise ValueError(
            "If several paths are given, all of them must be directories. To edit a config, pass "
            "only its path."
        )
    file = ConfigFile(paths[0], TEMPLATE)
    file.read()  # An unreadable file is an error of the command.
    return ConfigPage(file)

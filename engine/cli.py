"""The command ``onecycle``: a thin shell over the library."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from engine.config import ConfigError, Problem, load_document
from engine.config.check import check
from engine.config.document import Document

__all__ = ["main"]

OK, INVALID, USAGE = 0, 1, 2

_EPILOG = """\
exit status: 0 done, 1 the config is wrong, 2 wrong usage, or a file that cannot be read or written

examples:
  onecycle validate ds_config.json --world-size 8
  onecycle plot ds_config.json -o curves.png
  onecycle plot ds_config.json --csv - | head
  onecycle schedules
  onecycle schedules OneCycle
  onecycle schema OneCycle
"""


def main(
    arguments: Sequence[str] | None = None,
    out: TextIO | None = None,
    err: TextIO | None = None,
) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: those of the command line; by default the process's own.
        out: where findings and results go; by default standard output.
        err: where trouble of the tool itself goes; by default standard error.
    """
    out, err = out or sys.stdout, err or sys.stderr
    args = _parser().parse_args(arguments)
    try:
        status: int = args.run(args, out)
    except ConfigError as error:
        document = Document(error.name, None)
        unreadable = any(problem.rule == "unreadable" for problem in error.problems)
        _report(document, error.problems, err if unreadable else out)
        return USAGE if unreadable else INVALID
    except ValueError as error:
        print(f"onecycle: {error}", file=err)
        return USAGE
    except BrokenPipeError:
        # The reader of a pipe has enough (`… --csv - | head`); nothing is left to be written.
        sys.stderr.close()
        return OK
    except OSError as error:
        print(f"onecycle: {error.filename or 'output'}: {error.strerror}", file=err)
        return USAGE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onecycle",
        description="Prove a ds_config.json right and see its schedule, before anything runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    validate = commands.add_parser(
        "validate",
        help="say all that is wrong with a config",
        description="Say all that is wrong with a config, each thing with its place and its cure.",
    )
    validate.add_argument("file", metavar="FILE", help="a ds_config.json")
    validate.add_argument(
        "--world-size",
        type=_positive,
        metavar="N",
        help="number of ranks to prove the batch sizes for (default: what holds for any number)",
    )
    validate.set_defaults(run=_validate)

    plot = commands.add_parser(
        "plot",
        help="show the learning rate and momentum that every update will use",
        description="Show the learning rate and momentum that every update will use. Needs no "
        "batch size and no model: a file that holds a scheduler alone will do.",
    )
    plot.add_argument("file", metavar="FILE", help="a ds_config.json")
    plot.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="number of updates to show (default: enough to see the whole schedule)",
    )
    plot.add_argument(
        "--steps-per-epoch",
        type=_positive,
        metavar="N",
        help="updates in one pass over the data, for durations in epochs",
    )
    plot.add_argument(
        "--csv",
        metavar="FILE",
        help="write one row an update, columns step,lr,momentum,…; - for standard output",
    )
    plot.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="FILE|TYPE",
        help="other configs, or schedules by their names with their examples, to draw over it",
    )
    plot.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PNG",
        help="where to draw (default, without --csv: FILE with the suffix .png, in this folder)",
    )
    plot.add_argument(
        "-t",
        "--terminal",
        action="store_true",
        help="draw on the terminal instead of into a file",
    )
    plot.set_defaults(run=_plot)

    known = commands.add_parser(
        "schedules",
        help="list every schedule, or print all about one",
        description="List every schedule with a little curve of its learning rate, or print one's "
        "parameters, units, defaults, formula and an example block.",
    )
    known.add_argument("type", metavar="TYPE", nargs="?", help="a scheduler type, such as OneCycle")
    known.set_defaults(run=_schedules)

    schema = commands.add_parser(
        "schema",
        help="print the JSON schema of configs, or of one schedule's params",
        description="Print the JSON Schema (draft 2020-12) of configs, or of a schedule's params.",
    )
    schema.add_argument(
        "type", metavar="TYPE", nargs="?", help="a scheduler type, such as OneCycle"
    )
    schema.set_defaults(run=_schema)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, but is {text!r}")
    return int(text)


def _validate(args: argparse.Namespace, out: TextIO) -> int:
    document = load_document(args.file)
    problems = check(document, args.world_size)
    _report(document, problems, out)
    errors = sum(problem.severity == "error" for problem in problems)
    ranks = f" for {args.world_size} ranks" if args.world_size else ""
    verdict = f"{errors} error{'s' if errors > 1 else ''}" if errors else f"right{ranks}"
    print(f"{args.file}: {verdict}", file=out)
    return INVALID if errors else OK


def _plot(args: argparse.Namespace, out: TextIO) -> int:
    from engine.plots import draw, draw_on_terminal
    from engine.preview import preview

    shown = preview(args.file, steps_per_epoch=args.steps_per_epoch)
    steps = args.steps or shown.span
    if args.csv:
        header = ",".join(("step", *shown.columns))
        lines = (",".join(map(repr, row)) + "\n" for row in shown.rows(steps))
        if args.csv == "-":
            print(header, file=out)
            out.writelines(lines)
        else:
            with Path(args.csv).open("w", encoding="utf-8") as file:
                print(header, file=file)
                file.writelines(lines)
    if args.output or args.terminal or not args.csv:
        path = args.output or Path(Path(args.file).name).with_suffix(".png")
        curves = shown.columns
        if args.compare:
            others = [preview(_config_or_example(name)) for name in args.compare]
            steps = args.steps or max(each.span for each in (shown, *others))
            labels = [Path(args.file).name, *args.compare]
            curves = {
                f"{column}.{label}": curve
                for label, each in zip(labels, (shown, *others), strict=True)
                for column, curve in each.columns.items()
            }
        columns = {name: list(curve.values(steps)) for name, curve in curves.items()}
        title = f"{shown.schedule.type_name} of {args.file}"
        title = " and ".join((title, *args.compare))
        if args.terminal:
            colour = out.isatty() and "NO_COLOR" not in os.environ
            size = shutil.get_terminal_size()
            print(
                draw_on_terminal(columns, title, curves=curves, size=size, colour=colour), file=out
            )
            return OK
        draw(columns, path, title, curves=curves)
        if args.csv != "-":
            print(f"{path}: {steps} updates of {shown.schedule.type_name}", file=out)
    return OK


def _config_or_example(name: str) -> str | dict[str, Any]:
    """Return a path as it is, and the name of a schedule as a config with its example."""
    from schedules import SCHEDULES

    if name not in SCHEDULES:
        return name
    params = dict(SCHEDULES[name].example)
    run = {"max_duration": 100}
    return {"train_batch_size": 1, "scheduler": {"type": name, "params": params}, "engine": run}


def _schedules(args: argparse.Namespace, out: TextIO) -> int:
    from engine.catalog import listing, page
    from schedules import find

    for line in page(find(args.type)) if args.type else listing():
        print(line, file=out)
    return OK


def _schema(args: argparse.Namespace, out: TextIO) -> int:
    import schemas
    from engine.config.sections import SCHEMA, schedule_schema
    from schedules import find

    schema = schemas.read(SCHEMA)
    if args.type:
        schema = schedule_schema(find(args.type))
    print(json.dumps(schema, indent=2), file=out)
    return OK


def _report(document: Document, problems: Sequence[Problem], out: TextIO) -> None:
    lines = document.text.splitlines()
    for problem in problems:
        place = f":{problem.line}:{problem.column}" if problem.line else ""
        print(
            f"{document.name}{place}: {problem.severity}[{problem.rule}]: {problem.message}",
            file=out,
        )
        if problem.line and problem.line <= len(lines):
            source = lines[problem.line - 1].replace("\t", " ")
            print(f"  {source}\n  {' ' * (problem.column - 1)}^", file=out)
        if problem.hint:
            print(f"  help: {problem.hint}", file=out)


if __name__ == "__main__":
    sys.exit(main())

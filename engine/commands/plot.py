"""``onecycle plot``: the learning rate and momentum that every update will use."""

from __future__ import annotations

import argparse
import csv
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from engine.commands.arguments import OK, positive

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Show the learning rate and momentum that every update will use. Needs no "
        "batch size and no model: a file that holds a scheduler alone will do."
    )
    parser.add_argument("file", metavar="FILE", help="a ds_config.json")
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="number of updates to show (default: enough to see the whole schedule)",
    )
    parser.add_argument(
        "--steps-per-epoch",
        type=positive,
        metavar="N",
        help="updates in one pass over the data, for durations in epochs",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="write one row an update, columns step,lr,momentum,…; - for standard output",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="FILE|TYPE",
        help="other configs, or schedules by their names with their examples, to draw over it",
    )
    parser.add_argument(
        "--losses",
        type=Path,
        metavar="CSV",
        help="what a recorded run told a schedule that listens: the last column of each row, as "
        "csv_monitor writes it (default: a synthetic loss)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PNG",
        help="where to draw (default, without --csv: FILE with the suffix .png, in this folder)",
    )
    parser.add_argument(
        "-t",
        "--terminal",
        action="store_true",
        help="draw on the terminal instead of into a file",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Draw, or print, the curves of a config."""
    from engine.plots import draw, draw_on_terminal
    from engine.preview import preview

    shown = preview(args.file, steps_per_epoch=args.steps_per_epoch)
    losses = _losses(args.losses) if args.losses else []
    told, evidence = shown.told(losses) if args.losses else ({}, None)
    steps = args.steps or len(next(iter(told.values()), ())) or shown.span
    if args.csv:
        header = ",".join(("step", *(told or shown.columns)))
        rows = zip(range(steps), *told.values(), strict=False) if told else shown.rows(steps)
        lines = (",".join(map(repr, row)) + "\n" for row in rows)
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
            others = [
                preview(_config_or_example(name), steps_per_epoch=args.steps_per_epoch)
                for name in args.compare
            ]
            steps = args.steps or max(each.span for each in (shown, *others))
            labels = [Path(args.file).name, *args.compare]
            curves = {
                f"{column}.{label}": curve
                for label, each in zip(labels, (shown, *others), strict=True)
                for column, curve in each.columns.items()
            }
        columns = {name: list(curve.values(steps)) for name, curve in curves.items()}
        title = f"{shown.title} of {args.file}"
        if told:
            columns, curves = {name: of[:steps] for name, of in told.items()}, {}
            columns["loss"] = losses[:steps]
            title = f"{shown.schedule.type_name} of {args.file} on the losses of {args.losses}"
        title = " and ".join((title, *args.compare))
        if args.terminal:
            colour = out.isatty() and "NO_COLOR" not in os.environ
            size = shutil.get_terminal_size()
            print(
                draw_on_terminal(columns, title, curves=curves, size=size, colour=colour), file=out
            )
            return OK
        draw(columns, path, title, curves=curves, evidence=evidence)
        if args.csv != "-":
            print(f"{path}: {steps} updates of {shown.schedule.type_name}", file=out)
    return OK


def _losses(path: Path) -> list[float]:
    """Return the last column of a CSV file with a header."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row][1:]
    try:
        return [float(row[-1]) for row in rows]
    except ValueError as error:
        raise ValueError(
            f"{path} must hold a number at the end of each row, but: {error}."
        ) from None


def _config_or_example(name: str) -> str | dict[str, Any]:
    """Return a path as it is, and the name of a schedule as a config with its example."""
    from schedules import SCHEDULES

    if name not in SCHEDULES:
        return name
    params = dict(SCHEDULES[name].example)
    run = {"max_duration": 100}
    return {"train_batch_size": 1, "scheduler": {"type": name, "params": params}, "engine": run}

"""``onecycle plot``: the learning rate and momentum that every update will use."""

from __future__ import annotations

import argparse
import csv
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from engine.cli.commands.arguments import OK, positive

if TYPE_CHECKING:
    from schedules.core.controller import Evidence
    from schedules.core.curves import Curve

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
        help="where to draw (default, unless there is --csv or -t: FILE with the suffix .png, in "
        "this folder)",
    )
    parser.add_argument(
        "-t",
        "--terminal",
        action="store_true",
        help="draw on the terminal, and into a file only with --output",
    )


class _Shown(NamedTuple):
    """What is to be drawn, or written as a table."""

    title: str
    columns: dict[str, list[float]]
    curves: Mapping[str, Curve]
    """The same as formulas, with the names of their phases; none where a loss was listened to."""
    evidence: Evidence | None
    what: str


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Draw, or print, the curves of a config."""
    if args.losses and args.compare:
        raise ValueError("`--losses` must come without `--compare`: only one run has had them.")
    shown = _on_losses(args) if args.losses else _beforehand(args)
    if args.csv == "-":
        _write_csv(shown, out)
    elif args.csv:
        with Path(args.csv).open("w", encoding="utf-8") as file:
            _write_csv(shown, file)
    if args.terminal:
        _draw_on_terminal(shown, out)
    if args.output or not (args.csv or args.terminal):
        from engine.display.plots import draw

        path = args.output or Path(Path(args.file).name).with_suffix(".png")
        draw(shown.columns, path, shown.title, curves=shown.curves, evidence=shown.evidence)
        if args.csv != "-":
            print(f"{path}: {shown.what}", file=out)
    return OK


def _beforehand(args: argparse.Namespace) -> _Shown:
    """Return what a config, and others to compare it with, will give to each update."""
    from engine.display.preview import preview

    sources = [args.file, *map(_config_or_example, args.compare)]
    previews = [preview(source, steps_per_epoch=args.steps_per_epoch) for source in sources]
    steps = args.steps or max(each.span for each in previews)
    labels = [f".{label}" for label in (Path(args.file).name, *args.compare)]
    curves = {
        f"{column}{label if args.compare else ''}": curve
        for label, each in zip(labels, previews, strict=True)
        for column, curve in each.columns.items()
    }
    columns = {name: list(curve.values(steps)) for name, curve in curves.items()}
    title = " and ".join((f"{previews[0].title} of {args.file}", *args.compare))
    what = f"{steps} updates of {previews[0].schedule.type_name}"
    return _Shown(title, columns, curves, None, what)


def _on_losses(args: argparse.Namespace) -> _Shown:
    """Return what a schedule that listens answers to the losses of a run."""
    from engine.display.preview import preview

    shown = preview(args.file, steps_per_epoch=args.steps_per_epoch)
    losses = _losses(args.losses)
    told, evidence = shown.told(losses)
    steps = args.steps or len(losses) + 1  # what the last one led to is for the update after it
    columns = {name: of[:steps] for name, of in (told | {"loss": losses}).items()}
    name = shown.schedule.type_name
    title = f"{name} of {args.file} on the losses of {args.losses}"
    return _Shown(title, columns, {}, evidence, f"{len(losses)} losses told to {name}")


def _write_csv(shown: _Shown, file: TextIO) -> None:
    print(",".join(("step", *shown.columns)), file=file)
    for step, row in enumerate(itertools.zip_longest(*shown.columns.values())):
        known = ("" if value is None else repr(value) for value in row)
        print(step, *known, sep=",", file=file)


def _draw_on_terminal(shown: _Shown, out: TextIO) -> None:
    from engine.display.plots import draw_on_terminal
    from engine.display.terminal import supports_color

    drawn = draw_on_terminal(
        shown.columns,
        shown.title,
        curves=shown.curves,
        size=shutil.get_terminal_size(),
        colour=supports_color(out),
    )
    print(drawn, file=out)


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

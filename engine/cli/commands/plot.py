"""``onecycle plot``: plot the learning rate and momentum at every step."""

from __future__ import annotations

import argparse
import csv
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from engine.cli.commands.arguments import parse_positive_int
from engine.distributed.environment import OK

if TYPE_CHECKING:
    from schedules.core.controller import Evidence
    from schedules.core.curves import Curve

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle plot`` to a parser."""
    parser.description = (
        "Plot the learning rate and momentum at every step. The config needs only a `scheduler` "
        "section; batch sizes and a model are not required."
    )
    parser.add_argument("file", metavar="FILE", help="a ds_config.json")
    parser.add_argument(
        "--steps",
        type=parse_positive_int,
        metavar="N",
        help="number of steps to plot (default: the length of the run, or of the schedule)",
    )
    parser.add_argument(
        "--steps-per-epoch",
        type=parse_positive_int,
        metavar="N",
        help="steps per epoch; required if the config has durations in epochs",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="CSV file to write, with columns step,lr,momentum,… and one row per step; - for "
        "standard output",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="FILE|TYPE",
        help="configs, or schedule types with their example parameters, to add to the plot",
    )
    parser.add_argument(
        "--losses",
        type=Path,
        metavar="CSV",
        help="recorded losses for a loss-driven schedule, in the last column of a CSV file, such "
        "as a file of csv_monitor (default: a synthetic loss)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PNG",
        help="output image; its suffix sets the format (default without --csv and -t: FILE with "
        "the suffix .png, in the current directory)",
    )
    parser.add_argument(
        "-t",
        "--terminal",
        action="store_true",
        help="plot in the terminal; write an image only with --output",
    )


class _PlotData(NamedTuple):
    """The hyperparameter values to plot or to write as CSV."""

    title: str
    columns: dict[str, list[float]]
    curves: Mapping[str, Curve]
    """The curve of each column, with its named phases; empty if recorded losses are replayed."""
    evidence: Evidence | None
    summary: str


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Plot the schedule of a config to an image or the terminal, or write its values as CSV."""
    if args.losses and args.compare:
        raise ValueError("`--losses` and `--compare` cannot be combined. Use one of them.")
    data = _replay_losses(args) if args.losses else _preview_configs(args)
    if args.csv == "-":
        _write_csv(data, out)
    elif args.csv:
        with Path(args.csv).open("w", encoding="utf-8") as file:
            _write_csv(data, file)
    if args.terminal:
        _draw_on_terminal(data, out)
    if args.output or not (args.csv or args.terminal):
        from engine.display.plots import draw

        path = args.output or Path(Path(args.file).name).with_suffix(".png")
        draw(data.columns, path, data.title, curves=data.curves, evidence=data.evidence)
        if args.csv != "-":
            print(f"{path}: {data.summary}", file=out)
    return OK


def _preview_configs(args: argparse.Namespace) -> _PlotData:
    """Compute the schedules of the config and of the configs given with ``--compare``."""
    from engine.display.preview import preview

    sources = [args.file, *map(_find_example_or_path, args.compare)]
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
    summary = f"{steps} steps of {previews[0].schedule.type_name}"
    return _PlotData(title, columns, curves, None, summary)


def _replay_losses(args: argparse.Namespace) -> _PlotData:
    """Compute a loss-driven schedule for the recorded losses given with ``--losses``."""
    from engine.display.preview import preview

    data = preview(args.file, steps_per_epoch=args.steps_per_epoch)
    losses = _read_losses(args.losses)
    values, evidence = data.replay_losses(losses)
    steps = args.steps or len(losses) + 1  # the last loss determines the values of the next step
    columns = {name: column[:steps] for name, column in (values | {"loss": losses}).items()}
    name = data.schedule.type_name
    title = f"{name} of {args.file} on losses from {args.losses}"
    return _PlotData(title, columns, {}, evidence, f"{name} on {len(losses)} losses")


def _write_csv(data: _PlotData, file: TextIO) -> None:
    print(",".join(("step", *data.columns)), file=file)
    for step, row in enumerate(itertools.zip_longest(*data.columns.values())):
        known = ("" if value is None else repr(value) for value in row)
        print(step, *known, sep=",", file=file)


def _draw_on_terminal(data: _PlotData, out: TextIO) -> None:
    from engine.display.plots import draw_on_terminal
    from engine.display.terminal import supports_color

    drawn = draw_on_terminal(
        data.columns,
        data.title,
        curves=data.curves,
        size=shutil.get_terminal_size(),
        color=supports_color(out),
    )
    print(drawn, file=out)


def _read_losses(path: Path) -> list[float]:
    """Return the numbers in the last column of a CSV file, without the header row."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row][1:]
    try:
        return [float(row[-1]) for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: the last column must contain only numbers: {error}.") from None


def _find_example_or_path(name: str) -> str | dict[str, Any]:
    """Return the example config of a schedule type.

    Any other name is the path of a config and is returned unchanged.
    """
    from schedules import SCHEDULES

    if name not in SCHEDULES:
        return name
    params = dict(SCHEDULES[name].example)
    run = {"max_duration": 100}
    return {"train_batch_size": 1, "scheduler": {"type": name, "params": params}, "engine": run}

"""``onecycle plot``: plot the learning rate and momentum at every step."""

from __future__ import annotations

import argparse
import csv
import itertools
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from engine.cli.commands.arguments import (
    add_allow_imports,
    add_examples,
    add_set,
    find_schedule,
    find_schedule_name,
    parse_positive_int,
)
from engine.display.terminal import get_width, supports_color, wrap
from engine.distributed.environment import OK
from engine.errors import escape

if TYPE_CHECKING:
    from engine.display.preview import Preview
    from schedules.core.controller import Evidence
    from schedules.core.curves import Curve

__all__ = ["add_arguments", "run"]

_MAX_EXACT = 100_000
"""Maximum number of steps for which an image shows every step."""
_SAMPLES = 10_000
"""Number of evenly spaced steps to plot if a run is too long to plot every step."""
_MAX_ROWS = 10_000_000
_MAX_CURVES = 100


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
        help="number of steps to plot (default: the length of the run, or of the schedule if the "
        'length of the run is unknown). If total_num_steps is "auto", it is set to N. Without '
        "--steps, it is set to engine.max_duration, or to 1000 if engine.max_duration is not set",
    )
    parser.add_argument(
        "--steps-per-epoch",
        type=parse_positive_int,
        metavar="N",
        help="number of steps per epoch; required if the config contains durations in epochs",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="CSV file to write, with one row per step and the columns step, lr, momentum, … Use "
        '"-" to write to standard output',
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="FILE|TYPE",
        help="configs or schedule types to add to the plot. A schedule type is plotted as its "
        "built-in example, stretched to the length of the plot and scaled to the config's peak "
        "learning rate",
    )
    parser.add_argument(
        "--log", action="store_true", help="plot the learning rate on a logarithmic axis"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=5e-5,
        metavar="LR",
        help='learning rate to use in place of "auto" (default: 5e-5, as in transformers)',
    )
    parser.add_argument(
        "--warmup-steps",
        type=parse_positive_int,
        metavar="N",
        help='warmup length in steps to use in place of "auto" (default: a tenth of the run)',
    )
    parser.add_argument(
        "--losses",
        type=Path,
        metavar="CSV",
        help="CSV file with recorded losses in its last column, such as a file written by "
        "csv_monitor. A loss-driven schedule, such as AutoWU, is computed from these losses "
        "(default: synthetic losses)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="IMAGE",
        help="output file. Its suffix sets the format: .png, .pdf or another image format, or "
        ".html for a page with interactive charts. If --output, --csv and -t are all omitted, the "
        "plot of ds_config.json is written to ds_config.png in the current directory",
    )
    parser.add_argument(
        "-t",
        "--terminal",
        action="store_true",
        help="plot in the terminal. To write an image as well, add --output",
    )
    add_set(parser)
    add_allow_imports(parser)
    add_examples(
        parser,
        "onecycle plot ds_config.json",
        "onecycle plot ds_config.json -t",
        "onecycle plot ds_config.json --csv - | head",
        "onecycle plot ds_config.json --compare other.json WarmupLR -o compared.png",
        "onecycle plot ds_config.json --set scheduler.params.cycle_max_lr=0.01 -t",
        "onecycle plot autowu.json --losses losses.csv -o autowu.png",
    )


class _PlotData(NamedTuple):
    """The values of the hyperparameters at each step, for a plot or a CSV file."""

    title: str
    steps: int
    """Number of steps."""
    curves: Mapping[str, Curve]
    """The curve of each column, with its named phases; empty if recorded losses are replayed."""
    recorded: Mapping[str, list[float]]
    """The values of each column at each step; empty unless recorded losses are replayed."""
    evidence: Evidence | None
    summary: str
    sources: Mapping[str, str]
    """The name of each column's config or schedule; empty if recorded losses are replayed."""
    auto_values: Mapping[str, Mapping[str, Any]]
    """The values that replaced "auto", by config path and parameter name."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns, such as ``lr`` and ``momentum``."""
        return tuple(self.curves or self.recorded)

    def sample(self, most: int) -> tuple[Sequence[int], Mapping[str, Sequence[float]]]:
        """Return the steps to plot, and the values of each column at these steps.

        Args:
            most: maximum number of steps to return without sampling. For a longer run,
                `_SAMPLES` evenly spaced steps are returned.
        """
        if not self.curves:
            return range(self.steps), self.recorded
        if self.steps <= most:
            exact = {name: list(curve.values(self.steps)) for name, curve in self.curves.items()}
            return range(self.steps), exact
        last = self.steps - 1
        steps = [index * last // (_SAMPLES - 1) for index in range(_SAMPLES)]
        return steps, {name: [curve(k) for k in steps] for name, curve in self.curves.items()}

    def rows(self) -> Iterator[tuple[float | None, ...]]:
        """Yield the values of all columns at each step, as one tuple per step.

        A recorded column that is shorter than the others is padded with None.
        """
        if self.curves:
            return zip(*(curve.values(self.steps) for curve in self.curves.values()), strict=True)
        return itertools.zip_longest(*self.recorded.values())


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Plot a config's schedule or write its values as CSV, and return the exit status."""
    if args.losses and args.compare:
        raise ValueError("`--losses` and `--compare` cannot be combined. Use one of them.")
    data = _replay_losses(args) if args.losses else _preview_configs(args)
    if args.csv and data.steps > _MAX_ROWS:
        raise ValueError(
            f"`--csv` can write at most {_MAX_ROWS:,} steps, got {data.steps:,}. Use `--steps N` "
            "to write only the first N steps."
        )
    if args.csv == "-":
        _write_csv(data, out)
    elif args.csv:
        with Path(args.csv).open("w", encoding="utf-8") as file:
            _write_csv(data, file)
    if args.terminal:
        _draw_on_terminal(data, out, log=args.log)
    if args.output or not (args.csv or args.terminal):
        path = args.output or Path(Path(args.file).name).with_suffix(".png")
        count = _write_image(data, path, log=args.log or None)
        if args.csv != "-":
            note = "" if count == data.steps else f", sampled at {count:,} steps"
            for line in wrap(escape(f"{path}: {data.summary}{note}"), get_width(out)):
                print(line, file=out)
    for path, values in data.auto_values.items():
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        note = f'{path}: plotted with {shown} in place of "auto"'
        stream = sys.stderr if args.csv == "-" else out
        for line in wrap(escape(note), get_width(stream)):
            print(line, file=stream)
    return OK


def _write_image(data: _PlotData, path: Path, *, log: bool | None) -> int:
    """Write an image or an HTML page, depending on the suffix of the path.

    Returns:
        The number of steps in the plot.
    """
    described: dict[str, Any] = {
        "curves": data.curves,
        "sources": data.sources,
        "evidence": data.evidence,
    }
    if path.suffix.lower() in {".html", ".htm"}:
        from engine.display.curve_pages import build_curve_page
        from engine.display.html_charts import write_html

        steps, columns = data.sample(_SAMPLES)
        write_html(path, build_curve_page(columns, data.title, steps=steps, log=log, **described))
    else:
        from engine.display.plots import draw

        steps, columns = data.sample(_MAX_EXACT)
        draw(columns, path, data.title, steps=steps, log=log, **described)
    return len(steps)


def _preview_configs(args: argparse.Namespace) -> _PlotData:
    """Return the schedule curves of the config and of each ``--compare`` argument."""
    from engine.display.auto_values import AutoValues
    from engine.display.catalog import fit_example
    from engine.display.preview import preview
    from schedules import SCHEDULES
    from schedules.plots import name_columns

    compared = [_find_source(name) for name in args.compare]
    auto = AutoValues(args.learning_rate, args.steps, args.warmup_steps)

    def preview_config(path: str, assignments: Sequence[str] = ()) -> Preview:
        return preview(
            path,
            assignments=assignments,
            steps_per_epoch=args.steps_per_epoch,
            allow_imports=args.allow_imports,
            auto=auto,
        )

    first = preview_config(args.file, args.set)
    others = {name: preview_config(name) for name in compared if name not in SCHEDULES}
    steps = args.steps or max(each.span for each in (first, *others.values()))
    for each in (first, *others.values()):
        each.check_length(steps)
    label = Path(args.file).name + "".join(f" {each}" for each in args.set)
    shown = {label: first.curves}
    for name in compared:
        shown[name] = others[name].curves if name in others else fit_example(name, first, steps)
    curves: dict[str, Curve] = {}
    sources: dict[str, str] = {}
    for source, own in shown.items():
        columns = name_columns(own, source if compared else "")
        curves |= columns
        sources |= dict.fromkeys(columns, source)
    if len(curves) > _MAX_CURVES:
        raise ValueError(
            f"A plot can have at most {_MAX_CURVES} curves, got {len(curves):,}. Use fewer configs "
            "or param groups."
        )
    changed = f" with {', '.join(args.set)}" if args.set else ""
    title = " and ".join((f"{first.title} of {args.file}{changed}", *compared))
    drawn = max((first, *others.values()), key=lambda each: each.span)
    summary = f"{args.steps or drawn.num_steps} steps of {first.schedule.type_name}"
    autos = {
        path: each.auto_values
        for path, each in {**others, args.file: first}.items()
        if each.auto_values
    }
    return _PlotData(title, steps, curves, {}, None, summary, sources, autos)


def _find_source(name: str) -> str:
    """Return the config path or the schedule name for a ``--compare`` argument.

    Raises:
        ValueError: the argument is not an existing file, a known schedule, a file name with a
            suffix, or an import path with a colon.
    """
    if Path(name).is_file():
        return name
    if found := find_schedule_name(name):
        return found
    if not Path(name).suffix and ":" not in name:
        find_schedule(name)  # raises an error that suggests a schedule
    return name


def _replay_losses(args: argparse.Namespace) -> _PlotData:
    """Return the values of a loss-driven schedule for the losses in the ``--losses`` file."""
    from engine.display.preview import preview

    data = preview(
        args.file,
        assignments=args.set,
        steps_per_epoch=args.steps_per_epoch,
        allow_imports=args.allow_imports,
    )
    losses = _read_losses(args.losses)
    values, evidence = data.replay_losses(losses)
    # The last loss determines the values of the next step.
    steps = min(args.steps or len(losses) + 1, len(losses) + 1)
    columns = {name: column[:steps] for name, column in (values | {"loss": losses}).items()}
    name = data.schedule.type_name
    title = f"{name} of {args.file} for the losses in {args.losses}"
    summary = f"{name} on {len(losses)} losses"
    return _PlotData(title, steps, {}, columns, evidence, summary, {}, {})


def _write_csv(data: _PlotData, file: TextIO) -> None:
    csv.writer(file, lineterminator="\n").writerow(("step", *data.names))
    for step, row in enumerate(data.rows()):
        known = ("" if value is None else repr(value) for value in row)
        print(step, *known, sep=",", file=file)


def _draw_on_terminal(data: _PlotData, out: TextIO, *, log: bool) -> None:
    from engine.display.terminal_plots import draw_on_terminal

    steps, columns = data.sample(_SAMPLES)
    drawn = draw_on_terminal(
        columns,
        escape(data.title),
        steps=steps,
        curves=data.curves,
        sources=data.sources,
        log=log,
        size=shutil.get_terminal_size(),
        color=supports_color(out),
    )
    print(drawn, file=out)


def _read_losses(path: Path) -> list[float]:
    """Return the numbers in the last column of a CSV file, without the header row."""
    from engine.config.source import check_is_readable

    check_is_readable(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row][1:]
    try:
        return [float(row[-1]) for row in rows]
    except ValueError as error:
        raise ValueError(
            f"The last column of {path} must contain only numbers below the header row: {error}."
        ) from None

"""Write tables into pages of docs/results, and plot results."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiment import Experiment, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

START, END = "<!-- Written by the command above. -->\n", "<!-- End of the results. -->\n"


def write_page(experiment: Experiment, *tables: str) -> None:
    """Write the tables to the experiment's page, and replace the tables of an earlier call.

    A line above the tables names the dataset, seeds, machine, versions, date and CPU time. If the
    page does not exist, it is created with only this line and the tables.
    """
    path = experiment.output / f"{experiment.name}.md"
    results = experiment.results
    source = next((row["data"] for row in results.rows.values() if "data" in row), "")
    seeds = ", ".join(map(str, results.seeds))
    facts = (
        f"{source}; seeds {seeds}; {results.machine}; {results.minutes:.1f} minutes of CPU time."
    )
    block = "\n".join([START, facts, "", *(f"{table}\n" for table in tables), END])
    page = path.read_text(encoding="utf-8") if path.is_file() else START + END
    pattern = re.escape(START) + ".*?" + re.escape(END)
    path.write_text(re.sub(pattern, lambda _: block, page, flags=re.DOTALL), encoding="utf-8")
    print(block)


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_mean(values: Iterable[float], digits: int = 3) -> str:
    """Format the mean of the values and, if there are several, their standard deviation."""
    numbers = list(values)
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):,.{digits}f}" if len(numbers) > 1 else mean


def format_values(values: Iterable[float], digits: int = 3) -> str:
    """Format the values in ascending order, or their median and range if there are more than 3."""
    numbers = sorted(values)
    texts = [f"{number:.{digits}f}" for number in numbers]
    if len(numbers) <= 3:
        return ", ".join(texts)
    return f"{statistics.median(numbers):.{digits}f} ({texts[0]} to {texts[-1]})"


def get_last(rows: Iterable[Row], name: str) -> list[float]:
    """Return the value of ``name`` in the last history entry of each row."""
    return [row["history"][-1][name] for row in rows]


def build_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``panels`` panels side by side, and the list of these panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 4.2), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def plot_lr(axis: Axes, row: Row, *, scale: float = 1, **style: str | None) -> None:
    """Plot the learning rate of a run against the step number times ``scale``."""
    stride = row["lr_stride"] * scale
    axis.plot([stride * index for index in range(len(row["lr"]))], row["lr"], **style)


def plot_history(axis: Axes, rows: Sequence[Row], *, scale: float = 1, **style: str) -> None:
    """Plot the median and range of the test accuracy across several runs, at each evaluation.

    Args:
        axis: panel of a figure.
        rows: runs with different seeds. The curve ends where the shortest run ends.
        scale: factor by which the step is multiplied for the horizontal axis.
        style: color and label.
    """
    columns = list(zip(*(row["history"] for row in rows), strict=False))
    steps = [scale * column[0]["step"] for column in columns]
    values = [[entry["test_accuracy"] for entry in column] for column in columns]
    axis.plot(steps, [statistics.median(each) for each in values], **style)
    low, high = ([pick(each) for each in values] for pick in (min, max))
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure as an image at 150 dots per inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)

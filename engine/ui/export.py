"""Export the curves shown on the config page of ``onecycle ui`` as an image or a CSV file."""

from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path

from engine.ui.curves import CurveSet
from engine.ui.replies import Download

__all__ = ["export"]

_MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml", "csv": "text/csv"}
_MAX_ROWS = 2_000_000
_MAX_DRAWN = 10_000


def export(curves: CurveSet, name: str, kind: str, *, log: bool) -> Download:
    """Return the curves as a file.

    Args:
        curves: curves to export.
        name: file name of the config.
        kind: "png", "svg" or "csv".
        log: whether to plot the learning rate on a logarithmic axis; ignored for "csv".

    Raises:
        ValueError: ``kind`` is unknown, or the CSV file would have too many rows.
    """
    if kind not in _MEDIA_TYPES:
        raise ValueError(f"The format must be one of {', '.join(_MEDIA_TYPES)}, got {kind!r}.")
    data = _write_csv(curves) if kind == "csv" else _draw(curves, name, kind, log=log)
    return Download(f"{Path(name).stem}.{kind}", _MEDIA_TYPES[kind], data)


def _name_columns(curves: CurveSet) -> list[str]:
    return [
        ".".join(filter(None, (column.hyperparameter, column.group, column.source)))
        for column in curves.columns
    ]


def _write_csv(curves: CurveSet) -> bytes:
    if curves.steps > _MAX_ROWS:
        raise ValueError(
            f"A CSV file can contain at most {_MAX_ROWS:,} steps, got {curves.steps:,}. Enter a "
            "smaller number of steps."
        )
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("step", *_name_columns(curves)))
    values = [column.curve.values(curves.steps) for column in curves.columns]
    writer.writerows(zip(range(curves.steps), *values, strict=True))
    return file.getvalue().encode()


def _draw(curves: CurveSet, name: str, kind: str, *, log: bool) -> bytes:
    from engine.display.plots import draw

    names = _name_columns(curves)
    last = curves.steps - 1
    count = min(curves.steps, _MAX_DRAWN)
    steps = [index * last // max(count - 1, 1) for index in range(count)]
    values = {
        label: [column.curve(step) for step in steps]
        for label, column in zip(names, curves.columns, strict=True)
    }
    sources = {
        label: column.source or name for label, column in zip(names, curves.columns, strict=True)
    }
    is_compared = any(column.source for column in curves.columns)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, f"curves.{kind}")
        draw(
            values,
            path,
            f"{curves.preview.title} of {name}",
            steps=steps,
            curves=dict(zip(names, (column.curve for column in curves.columns), strict=True)),
            sources=sources if is_compared else None,
            log=log,
        )
        return path.read_bytes()

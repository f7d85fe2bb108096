"""Build a page of interactive charts as a single HTML file that needs no network access."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Decision",
    "Line",
    "Mark",
    "Page",
    "Panel",
    "Table",
    "build_html",
    "read_extra",
    "write_html",
]

_STATIC = Path(__file__).parent / "static"
_PLACEHOLDER = re.compile(r"\{\{ ([\w.]+) \}\}")
_MODULE_LINE = re.compile(r"^import .*\n|^export (?=async |function |class |const )", re.MULTILINE)


@dataclass(frozen=True)
class Line:
    """A line in a chart."""

    label: str
    values: Sequence[float | None]
    """Values at the panel's `steps`; None or NaN for missing values."""
    color: int | None = None
    """Index of the color in the palette; None to use the index of the line in the panel."""
    is_compared: bool = False
    """Whether the line is shown only for comparison. Such lines are dashed."""
    has_gaps: bool = False
    """Whether the line continues across missing values instead of being interrupted."""


@dataclass(frozen=True)
class Panel:
    """A chart on a page."""

    name: str
    label: str
    steps: Sequence[float]
    lines: Sequence[Line]
    is_log: bool = False
    """Whether the vertical axis supports a logarithmic scale."""


@dataclass(frozen=True)
class Mark:
    """A named vertical line in each chart."""

    position: float
    name: str


@dataclass(frozen=True)
class Decision:
    """Text and charts that show why a loss-driven schedule ended its warmup."""

    text: str
    panels: Sequence[Panel]
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Table:
    """A table below the charts."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Page:
    """The contents of an HTML page with charts."""

    title: str
    panels: Sequence[Panel]
    status: str = ""
    """Short text next to the title, such as "training"."""
    facts: Sequence[tuple[str, str | float]] = ()
    """Names and values to show above the charts."""
    marks: Sequence[Mark] = ()
    tables: Sequence[Table] = ()
    decision: Decision | None = None
    config: str = ""
    """Text of the config."""
    is_log: bool = False
    """Whether the axes that support a logarithmic scale use it when the page opens."""
    is_grid: bool = False
    """Whether the charts are arranged in two columns if there is enough space."""


def build_html(page: Page, extra: Mapping[str, Any] | None = None) -> str:
    """Return a page as the text of a self-contained HTML file.

    Args:
        page: contents of the page.
        extra: JSON-compatible values to store in the file; `read_extra` returns them.
    """
    data = _encode(page)
    if extra is not None:
        data["extra"] = extra
    # In a script element, only `<` can end the data or start a comment.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, after = _read_template()
    return f"{before}{text}{after}"


def write_html(path: Path, page: Page, extra: Mapping[str, Any] | None = None) -> None:
    """Write a page to a file. An existing file is not replaced until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(build_html(page, extra), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_extra(path: Path) -> Any:
    """Return the values passed as ``extra`` to the `write_html` call that wrote a file.

    Raises:
        ValueError: the file is not a page that `write_html` wrote.
        OSError: the file cannot be read.
    """
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>',
        path.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    if found is None:
        raise ValueError(f"{path} is not a report that onecycle wrote.")
    return json.loads(found[1]).get("extra")


@functools.cache
def _read_template() -> tuple[str, str]:
    """Return the text of the page template before and after the placeholder for the data."""
    text = _STATIC.joinpath("report.html").read_text(encoding="utf-8")
    before, after = text.split("{{ data }}")
    return _fill(before), _fill(after)


def _fill(text: str) -> str:
    return _PLACEHOLDER.sub(lambda found: _read_static(found[1]), text)


def _read_static(name: str) -> str:
    """Return the text of a script or a style sheet, without JavaScript module syntax."""
    text = (_STATIC / name).read_text(encoding="utf-8")
    assert "</script" not in text, f"{name} must not contain `</script`"
    return _MODULE_LINE.sub("", text) if name.endswith(".js") and name != "uplot.js" else text


def _encode(value: Any) -> Any:
    """Convert a dataclass to a dict with camelCase keys and None instead of non-finite numbers."""
    return _convert(asdict(value))


def _convert(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {
            _to_camel_case(key): _convert(each)
            for key, each in value.items()
            if not (key == "color" and each is None)
        }
    if isinstance(value, list | tuple | range):
        return [_convert(each) for each in value]
    return value


def _to_camel_case(name: str) -> str:
    return re.sub(r"_(\w)", lambda found: found[1].upper(), name)

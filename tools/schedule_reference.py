"""Build the Markdown reference of all schedules, one page per family, and plot each schedule."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from docstrings import to_markdown

from engine.display.catalog import (
    EXAMPLE_RUN,
    EXAMPLE_STEPS,
    example_curves,
    get_summary,
    group_by_source,
)
from schedules import SCHEDULES, Schedule
from schedules.core.descriptions import read_descriptions
from schedules.core.fields import Field, describe_schema, read_fields
from schedules.plots import build_figure

__all__ = ["build_schedule_pages", "draw_schedules"]


class Page(NamedTuple):
    """File name (without extension) and first sentence of a page of the schedule reference."""

    name: str
    sentence: str


_PAGES = {
    "DeepSpeed": Page("deepspeed", "DeepSpeed's schedules, with DeepSpeed's names and parameters."),
    "Composer (MosaicML)": Page(
        "composer", "The schedulers of MosaicML's Composer, with Composer's names and parameters."
    ),
    "PyTorch": Page("pytorch", "PyTorch's schedulers, with PyTorch's names and parameters."),
    "Dive into Deep Learning": Page(
        "d2l",
        'Schedulers from the book "Dive into Deep Learning", with an optional warmup as in MXNet.',
    ),
    "SambaFlow (SambaNova)": Page(
        "sambaflow",
        "SambaFlow's schedules, with parameters named after its command-line arguments.",
    ),
    "Megatron-LM": Page("megatron", "Megatron-LM's scheduler, with Megatron-LM's parameter names."),
    "General": Page(
        "general",
        "General-purpose schedules: multi-phase, warmup-stable-decay and inverse square root.",
    ),
    "Built from other schedules": Page(
        "composites",
        "Schedules that run other schedules in sequence or in parallel, or multiply their factors.",
    ),
    "Driven by the loss or a metric": Page(
        "feedback", "Schedules that depend on the loss or on a metric."
    ),
}
"""Maps each heading in the output of `onecycle schedules` to a page of the schedule reference."""

_INTRODUCTION = """\
# Schedules

This page lists the {count} built-in schedules by origin. To use a schedule, set it in the config as
`"scheduler": {{"type": …, "params": {{…}}}}`, or pass it to `schedules.attach` in your own training
loop. `onecycle schedules TYPE` prints the documentation of a schedule in the terminal, and
`onecycle plot` draws the schedule of a config. Each plot on the linked pages shows a schedule with
example parameters during a run of 100 steps and for 20 steps after the run.

## Durations

A duration is a number of optimizer steps or a time string:
"10ep" (epochs), "500ba" (steps), "4096sp" (samples), "1e9tok" (tokens) or "0.1dur" (fraction of the
run)."""


def build_schedule_pages() -> dict[str, str]:
    """Return the text of each schedule reference page, keyed by its path relative to ``docs``."""
    pages = {"schedules.md": "\n".join(_build_overview()) + "\n"}
    for title, classes in group_by_source().items():
        lines = _build_page(title, classes)
        pages[f"schedules/{_PAGES[title].name}.md"] = "\n".join(lines) + "\n"
    return pages


def draw_schedules(directory: Path) -> None:
    """Plot each schedule with its example parameters, and save the plots as SVG files."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "onecycle"}  # text stays text
    for name, cls in SCHEDULES.items():
        curves = example_curves(cls)
        values = {key: list(curve.values(EXAMPLE_STEPS)) for key, curve in curves.items()}
        figure, _ = build_figure(values, name, curves=curves)
        with mpl.rc_context(settings):
            figure.savefig(directory / f"{name}.svg", metadata={"Date": None})


def _build_overview() -> Iterator[str]:
    yield _INTRODUCTION.format(count=len(SCHEDULES))
    for title, classes in group_by_source().items():
        page = _PAGES[title]
        yield f"\n## {title}\n\n{page.sentence}\n\n| type | summary |\n|---|---|"
        for name, cls in classes.items():
            summary = to_markdown(get_summary(cls))
            yield f"| [{name}](schedules/{page.name}.md#{name.lower()}) | {summary} |"


def _build_page(title: str, classes: Mapping[str, type[Schedule[Any]]]) -> Iterator[str]:
    yield f"# {title}\n"
    yield f"{_PAGES[title].sentence} [Schedules](../schedules.md) lists all schedules."
    for name, cls in classes.items():
        yield f"\n## {name}\n\n![Plot of {name}](../pictures/{name}.svg)\n"
        yield to_markdown(inspect.getdoc(cls) or "")
        yield f"\nExample:\n\n```json\n{json.dumps(_build_example(cls), indent=2)}\n```"
        fields = read_fields(cls)
        if fields:
            yield "\n| parameter | accepts | default | meaning |\n|---|---|---|---|"
        descriptions = read_descriptions(cls)
        for key, field in fields.items():
            yield _format_row(field, field.complete(descriptions[key], explain_time=False))


def _build_example(cls: type[Schedule[Any]]) -> dict[str, Any]:
    """Return a config with a schedule's example params and, if needed, the length of the run."""
    config: dict[str, Any] = {"scheduler": {"type": cls.type_name, "params": dict(cls.example)}}
    if cls(**cls.example).unresolved_fields:
        config["engine"] = {"max_duration": f"{EXAMPLE_RUN.total_steps:.0f}ba"}
    return config


def _format_row(field: Field, meaning: str) -> str:
    default = "required" if field.required else f"`{json.dumps(field.default)}`"
    cells = (f"`{field.name}`", describe_schema(field.schema), default, to_markdown(meaning))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

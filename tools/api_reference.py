"""Build the pages of the API reference, into which mkdocstrings inserts the docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from docstrings import to_markdown

import engine
import schedules

__all__ = ["build_api_pages"]

_PAGES = {
    "training": ("Training", ["engine.initialize", "engine.Engine"]),
    "configs": (
        "Configs",
        [
            "engine.load_config",
            "engine.validate",
            "engine.Config",
            "engine.Problem",
            "engine.add_config_arguments",
            "engine.add_schedule_arguments",
        ],
    ),
    "lr_range_test": ("LR range test", ["engine.lr_range_test", "engine.LRRangeReport"]),
    "schedules": (
        "Schedules",
        [
            "schedules.attach",
            "schedules.from_config",
            "schedules.trace",
            "schedules.plot",
            "schedules.register",
            "schedules.Schedule",
            "schedules.FeedbackSchedule",
            "schedules.ScheduleBinder",
            "schedules.Horizon",
            "schedules.SCHEDULES",
        ],
    ),
    "deepspeed": ("DeepSpeed", ["engine.register_with_deepspeed"]),
    "errors": (
        "Errors",
        [
            "engine.ConfigError",
            "engine.CheckpointError",
            "engine.MisuseError",
            "schedules.ScheduleError",
        ],
    ),
}
"""Maps each page to its title and to the names that it documents."""

_INTRODUCTION = """\
# API

These are the public names of the packages `engine` and `schedules`. All names of `engine` can also
be imported from `onecycle`, and `schedules` is also available as `onecycle.schedules`.
[Schedules](../schedules/index.md) documents the class of each schedule."""


def build_api_pages() -> dict[str, str]:
    """Return the Markdown text of each page, keyed by a path such as ``reference/index.md``.

    Raises:
        ValueError: a public name of `engine` or `schedules` is not in `_PAGES`.
    """
    listed = {name for _, names in _PAGES.values() for name in names}
    if missing := set(_find_public_names()) - listed:
        raise ValueError(
            f"The API reference does not document {', '.join(sorted(missing))}. Add each name to "
            "`_PAGES` in tools/api_reference.py."
        )
    pages = {"reference/index.md": "\n".join(_build_overview()) + "\n"}
    for page, (title, names) in _PAGES.items():
        blocks = (f"::: {name}" for name in names)
        pages[f"reference/{page}.md"] = "\n\n".join([f"# {title}", *blocks]) + "\n"
    return pages


def _find_public_names() -> Iterator[str]:
    for package in (engine, schedules):
        for name in package.__all__:
            if name != "__version__" and name not in schedules.SCHEDULES:
                yield f"{package.__name__}.{name}"


def _build_overview() -> Iterator[str]:
    yield _INTRODUCTION
    for page, (title, names) in _PAGES.items():
        yield f"\n## {title}\n\n| name | summary |\n|---|---|"
        for name in names:
            summary = to_markdown(_get_summary(name))
            yield f"| [`{name}`]({page}.md#{name}) | {summary} |"


def _get_summary(name: str) -> str:
    package, _, attribute = name.partition(".")
    value: Any = getattr({"engine": engine, "schedules": schedules}[package], attribute)
    return (inspect.getdoc(value) or "").partition("\n")[0]

"""Format config problems as text, JSON, GitHub annotations or SARIF."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from engine.config import ConfigError, Problem
from engine.config.parser import Document
from engine.display.terminal import count_columns, get_width, truncate, wrap
from engine.errors import escape

__all__ = ["FORMATS", "Report", "write_error"]

_COLORS = {"error": "31", "warning": "33", "note": "36"}
_GITHUB_MESSAGE = "%\r\n"
_GITHUB_PROPERTY = "%\r\n:,"
_SARIF_LEVELS = {"error": "error", "warning": "warning", "note": "note"}
_WIDTH = 100
_MAX_PRINTED = 100


@dataclass(frozen=True)
class Report:
    """A parsed config, its problems, and the settings for printing them."""

    document: Document
    problems: Sequence[Problem]
    color: bool = False
    width: int | None = None
    """Width of the terminal in characters; None to print each problem's message on one line."""


def _select_problems(problems: Sequence[Problem]) -> tuple[list[Problem], int]:
    """Return the problems to print, and the number of problems that are left out.

    At most `_MAX_PRINTED` problems are printed: the most severe ones, in their original order.
    """
    severities = list(_COLORS)
    by_severity = sorted(
        range(len(problems)), key=lambda index: severities.index(problems[index].severity)
    )
    chosen = sorted(by_severity[:_MAX_PRINTED])
    return [problems[index] for index in chosen], len(problems) - len(chosen)


def _format_text(report: Report) -> Iterator[str]:
    lines = report.document.lines
    name = escape(report.document.name)
    problems, omitted = _select_problems(report.problems)
    for problem in problems:
        location = f":{problem.line}:{problem.column}" if problem.line else ""
        head = f"{problem.severity}[{problem.rule}]"
        text = "\n".join(wrap(f"{name}{location}: {head}: {problem}", report.width))
        if report.color:  # after wrapping, because escape codes have no width
            text = text.replace(head, f"\033[1;{_COLORS[problem.severity]}m{head}\033[0m", 1)
        yield text
        if problem.line and problem.line <= len(lines) and report.document.text:
            yield from _quote_line(lines[problem.line - 1], problem.column, report.width)
    if omitted:
        yield f"{name}: … and {omitted:,} more"


def _quote_line(line: str, column: int, width: int | None) -> Iterator[str]:
    """Yield a line of the config and a marker below the column of a problem."""
    size = _WIDTH if width is None else min(_WIDTH, width - 2)
    source = line.replace("\t", " ")
    start = 0
    if len(source) > size or count_columns(source) > size:
        start = max(0, column - size // 2)
        while count_columns(source[start : column - 1]) >= max(1, size // 2):
            start += 1  # wide characters leave space for fewer of them
    excerpt = source[start : start + size]
    # GitHub executes a line of a log that starts with "::", also after spaces.
    margin = "| " if excerpt.lstrip().startswith(("::", "##")) else "  "
    before = count_columns(escape(excerpt[: column - 1 - start]))
    yield f"{margin}{truncate(escape(excerpt), max(size, before + 1))}"
    yield f"{margin}{' ' * before}^"


def _format_json(report: Report) -> Iterator[str]:
    found = []
    for problem in report.problems:
        fields = {key: value for key, value in asdict(problem).items() if key != "fix"}
        found.append({"file": report.document.name, **fields})
    yield json.dumps(found, indent=2)


def _format_github(report: Report) -> Iterator[str]:
    name = _encode(report.document.name, _GITHUB_PROPERTY)
    problems, omitted = _select_problems(report.problems)
    for problem in problems:
        command = "notice" if problem.severity == "note" else problem.severity
        location = f",line={problem.line},col={problem.column}" if problem.line else ""
        message = _encode(f"{problem.message} {problem.hint}".strip(), _GITHUB_MESSAGE)
        yield f"::{command} file={name}{location},title={problem.rule}::{message}"
    if omitted:
        yield f"::notice file={name}::… and {omitted:,} more"


def _encode(text: str, characters: str) -> str:
    """Percent-encode ``characters`` in a GitHub workflow command, and escape control characters."""
    encoded = "".join(f"%{ord(each):02X}" if each in characters else each for each in text)
    return escape(encoded)


def _format_sarif(report: Report) -> Iterator[str]:
    from engine.config.rules.pages import RULEBOOK

    used = sorted({problem.rule for problem in report.problems})
    rules = [
        {
            "id": rule,
            "shortDescription": {"text": RULEBOOK[rule].summary},
            "fullDescription": {"text": RULEBOOK[rule].reason},
            "help": {"text": RULEBOOK[rule].fix},
        }
        for rule in used
    ]
    results = [
        {
            "ruleId": problem.rule,
            "ruleIndex": used.index(problem.rule),
            "level": _SARIF_LEVELS[problem.severity],
            "message": {"text": str(problem)},
            "locations": [
                {"physicalLocation": _build_sarif_location(report.document.name, problem)}
            ],
        }
        for problem in report.problems
    ]
    tool = {"driver": {"name": "onecycle", "rules": rules}}
    run: dict[str, Any] = {"tool": tool, "columnKind": "unicodeCodePoints", "results": results}
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [run],
    }
    yield json.dumps(log, indent=2)


def _build_sarif_location(name: str, problem: Problem) -> dict[str, Any]:
    location: dict[str, Any] = {"artifactLocation": {"uri": name}}
    if problem.line:
        location["region"] = {"startLine": problem.line, "startColumn": problem.column}
    return location


def write_error(error: ConfigError, out: TextIO) -> None:
    """Write the problems of a `ConfigError` to a stream as text."""
    report = Report(Document(error.name, None), error.problems, width=get_width(out))
    for line in _format_text(report):
        print(line, file=out)


FORMATS: Mapping[str, Callable[[Report], Iterator[str]]] = {
    "text": _format_text,
    "json": _format_json,
    "github": _format_github,
    "sarif": _format_sarif,
}
"""Maps each output format of `onecycle validate` to a function that yields a report's lines."""

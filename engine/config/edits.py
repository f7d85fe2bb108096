"""Mechanical repairs of a config's text: a key renamed, a value rewritten; all else stays."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from json import JSONDecoder

from engine.config.parser import Document
from engine.errors import Problem

__all__ = ["repair"]


def repair(document: Document, problems: Sequence[Problem]) -> tuple[str, list[Problem]]:
    """Return the text with every repair made that needs no thought, and the problems so mended.

    Comments, order and spacing stay as they are. A key is not renamed where its new name is taken.
    """
    text = document.text
    begins = [0, *itertools.accumulate(len(line) + 1 for line in text.split("\n"))]
    edits: list[tuple[int, int, str]] = []
    mended = []
    taken = set(document.places)
    for problem in problems:
        place = document.places.get(problem.pointer)
        if problem.fix is None or place is None:
            continue
        line, column = place.key if problem.fix.key else place.value
        begin = begins[line - 1] + column - 1
        if problem.fix.key:
            new = f"{problem.pointer.rpartition('/')[0]}/{problem.fix.key}"
            if new in taken:
                continue
            taken.add(new)
        if not text.startswith('"', begin):
            continue
        _, end = JSONDecoder().raw_decode(text, begin)
        edits.append((begin, end, json.dumps(problem.fix.key or problem.fix.value)))
        mended.append(problem)
    for begin, end, new in sorted(edits, reverse=True):
        text = text[:begin] + new + text[end:]
    return text, mended

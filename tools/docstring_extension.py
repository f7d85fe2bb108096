"""Griffe extension that converts the docstrings of the API reference to Markdown."""

from __future__ import annotations

import inspect
from typing import Any

import griffe
from docstrings import to_markdown


class MarkdownDocstrings(griffe.Extension):
    """Griffe extension that converts docstrings to Markdown before mkdocstrings parses them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Convert an object's docstring to Markdown in place."""
        if obj.docstring:
            obj.docstring.value = to_markdown(inspect.cleandoc(obj.docstring.value))

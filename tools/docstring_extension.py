"""Extension of griffe that converts the docstrings of the API reference to Markdown."""

from __future__ import annotations

import inspect
from typing import Any

import griffe
from docstrings import to_markdown


class MarkdownDocstrings(griffe.Extension):
    """Convert each docstring before mkdocstrings parses its sections."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace the text of an object's docstring."""
        if obj.docstring:
            obj.docstring.value = to_markdown(inspect.cleandoc(obj.docstring.value))

"""Convert docstrings to Markdown for the generated reference pages."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterator

__all__ = ["to_markdown"]

_LITERAL_BLOCK = re.compile(r"(^|(?<=\S))::\n\n((?: {4}.*\n|\n)+)", re.MULTILINE)
_DOCTEST = re.compile(r"^>>> (?:.+\n)+", re.MULTILINE)


def to_markdown(docstring: str) -> str:
    """Return a docstring as Markdown, with fenced code blocks and single backticks.

    >>> print(to_markdown("At step k, with ``f``::\\n\\n    lr = f(k)"))
    At step k, with `f`:
    <BLANKLINE>
    ```text
    lr = f(k)
    ```
    """
    text = _LITERAL_BLOCK.sub(_fence_literal, docstring.rstrip() + "\n")
    text = _DOCTEST.sub(_fence_doctest, text)
    return "\n".join(_replace_double_backticks(text)).rstrip()


def _fence_literal(block: re.Match[str]) -> str:
    is_sentence = block.start() > 0 and block.string[block.start() - 1] != "\n"
    code = textwrap.dedent(block[2]).strip("\n")
    return f"{':' if is_sentence else ''}\n\n```text\n{code}\n```\n\n"


def _fence_doctest(block: re.Match[str]) -> str:
    return f"```pycon\n{block[0]}```\n"


def _replace_double_backticks(text: str) -> Iterator[str]:
    fenced = itertools.accumulate(line.startswith("```") for line in text.splitlines())
    for line, fences in zip(text.splitlines(), fenced, strict=True):
        yield line if fences % 2 else line.replace("``", "`") if "```" not in line else line

"""The tools that turn docstrings and links into pages of the documentation."""

import importlib
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"

DOCSTRING = """\
Decay the learning rate.

At step k, with ``gamma``::

    lr(k) = lr * gamma ** k

::

    unnamed

>>> decay("``")
1

Source: a paper.
"""
MARKDOWN = """\
Decay the learning rate.

At step k, with `gamma`:

```text
lr(k) = lr * gamma ** k
```



```text
unnamed
```

```pycon
>>> decay("``")
1
```

Source: a paper."""

PAGES = {
    "README.md": "index.md",
    "docs/config.md": "config/index.md",
    "docs/guides/data.md": "guides/data.md",
    "docs/a.svg": "a.svg",
}


@pytest.fixture
def import_tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module


def test_docstring_becomes_markdown_with_fences(import_tool):
    assert import_tool("docstrings").to_markdown(DOCSTRING) == MARKDOWN


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[keys](../config.md#top-level)", "[keys](../config/index.md#top-level)"),
        ("[home](../../README.md)", "[home](../index.md)"),
        ("![curve](../a.svg)", "![curve](../a.svg)"),
        ("[`register`](../../schedules/core/registry.py)", "`register`"),
        ("[records](../decisions)", "[records](../decisions/index.md)"),
        ("[missing](nothing.md)", "[missing](nothing.md)"),
        ("[web](https://pytorch.org/docs) [here](#top)",) * 2,
        ("```python\nx = y[0](../config.md)\n```",) * 2,
    ],
)
def test_link_between_files_becomes_link_between_pages(text, expected, import_tool):
    pytest.importorskip("nbconvert", reason="`make docs` installs it")
    rewrite_links = import_tool("build_site").rewrite_links
    assert rewrite_links(text, "docs/guides/data.md", PAGES) == expected


def test_pattern_in_the_nav_becomes_the_pages_that_are_not_named(import_tool):
    pytest.importorskip("nbconvert", reason="`make docs` installs it")
    nav = [{"Home": "index.md"}, {"Guides": ["guides/*.md", "guides/z.md"]}, {"None": ["no/*.md"]}]
    pages = ["guides/z.md", "guides/b.md", "guides/a.md", "index.md"]
    assert import_tool("build_site").expand_nav(nav, pages) == [
        {"Home": "index.md"},
        {"Guides": ["guides/a.md", "guides/b.md", "guides/z.md"]},
    ]


def test_every_public_name_is_in_the_api_reference(import_tool):
    pages = import_tool("api_reference").build_api_pages()
    assert "::: engine.initialize" in pages["reference/training.md"]

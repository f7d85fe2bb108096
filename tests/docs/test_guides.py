"""The snippets of the guides run, in the order of each page, and every question has a page."""

import re
import sys
from unittest import mock

import pytest

from tests.docs.snippets import ROOT, Page

QUESTIONS = {
    "own DataLoader": "guides/data.md",
    "W&B": "guides/monitors.md",
    "gradient accumulation": "guides/batch_size.md",
    "two nodes": "guides/multi_node.md",
    "layer-wise decay": "guides/param_groups.md",
    "weight-decay schedule": "guides/param_groups.md",
    "evaluation": "guides/evaluation.md",
    "Hugging Face": "from/transformers.md",
    "differences from DeepSpeed": "drop_in.md",
    "own schedule": "guides/own_schedule.md",
}
"""Queries of new users, and the page that they must find."""
GUIDES = [
    path for path in sorted((ROOT / "docs" / "guides").glob("*.md")) if path.name != "README.md"
]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Return a new working directory, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", mock.MagicMock())  # sends nothing
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_every_snippet_of_the_guide_runs(path, directory):
    assert Page(path, directory).run() > 0


@pytest.mark.parametrize(("query", "page"), QUESTIONS.items())
def test_heading_answers_the_query(query, page):
    text = (ROOT / "docs" / page).read_text()
    headings = [line.lower() for line in re.findall(r"^#+ (.+)", text, re.MULTILINE)]
    words = query.lower().split()
    assert any(all(word in heading for word in words) for heading in headings), headings


@pytest.mark.parametrize("directory", ["guides", "from"])
def test_index_lists_every_page(directory):
    pages = {path.name for path in (ROOT / "docs" / directory).glob("*.md")} - {"README.md"}
    index = (ROOT / "docs" / directory / "README.md").read_text()
    assert pages <= set(re.findall(r"\]\(([^)#]+)\)", index))

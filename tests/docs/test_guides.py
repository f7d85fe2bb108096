"""The snippets of the guides run, in the order of each page."""

import sys
from unittest import mock

import pytest

from tests.docs.snippets import ROOT, Page

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

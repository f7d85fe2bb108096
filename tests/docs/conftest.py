"""The working directory of the snippets."""

import sys
from unittest import mock

import pytest


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

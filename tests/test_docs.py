"""The documentation: its configs are valid, and the files that it links to exist."""

import json
import re
from pathlib import Path

import pytest

from engine.config import validate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


def configs():
    for page in PAGES:
        for number, block in enumerate(
            re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)
        ):
            yield pytest.param(block, id=f"{page.name}-{number}")


@pytest.mark.parametrize("block", list(configs()))
def test_config_in_documentation_is_valid(block):
    shown = json.loads(block if block.startswith("{") else f"{{{block}}}")
    whole = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}} | shown
    assert [problem for problem in validate(whole) if problem.severity != "note"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_in_documentation_points_to_an_existing_file(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []

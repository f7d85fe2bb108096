"""What the documentation shows: every config in it is right, every file that it names is there."""

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
def test_a_config_that_is_shown_is_right(block):
    shown = json.loads(block if block.startswith("{") else f"{{{block}}}")
    whole = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}} | shown
    assert [problem for problem in validate(whole) if problem.severity != "note"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_file_that_is_named_is_there(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []

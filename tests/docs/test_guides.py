"""The snippets of the guides run, in the order of each page, and every question has a page."""

import json
import re

import pytest

import engine
import schemas
from tests.docs.snippets import BASE_CONFIG, ROOT, Page, read_text_outside_blocks

QUESTIONS = {
    "own DataLoader": "guides/data.md",
    "W&B": "guides/monitors.md",
    "gradient accumulation": "guides/batch_size.md",
    "two nodes": "guides/multi_node.md",
    "layer-wise decay": "guides/param_groups.md",
    "weight decay schedule": "guides/param_groups.md",
    "evaluation": "guides/evaluation.md",
    "Hugging Face": "from/transformers.md",
    "differences from DeepSpeed": "drop_in.md",
    "own schedule": "guides/own_schedule.md",
}
"""Queries of new users, and the page that they must find."""
GUIDES = [
    path for path in sorted((ROOT / "docs" / "guides").glob("*.md")) if path.name != "README.md"
]


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


def find_config_fragments():
    """Yield each config in running text, such as ``"bf16": {"enabled": true}``.

    Fragments that start with a key of a section, such as ``"enabled": true``, are left out.
    """
    keys = schemas.read("ds_config.schema.json")["properties"]
    for directory in ("guides", "from"):
        for page in sorted((ROOT / "docs" / directory).glob("*.md")):
            text = read_text_outside_blocks(page)
            for code in re.findall(r'`("(?:\w+)": [^`]+)`', text):
                if code.split('"')[1] in keys and "…" not in code:
                    yield pytest.param(" ".join(code.split()), id=f"{page.stem}: {code[:40]}")


@pytest.mark.parametrize("code", list(find_config_fragments()))
def test_config_in_running_text_is_valid(code):
    part = json.loads(f"{{{code}}}")
    base = BASE_CONFIG | {"train_batch_size": 64}
    base["engine"] = {"max_duration": "10ep"}
    for key, value in part.items():
        base[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    assert [problem for problem in engine.validate(base) if problem.severity != "note"] == []

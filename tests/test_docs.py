"""The documentation: its configs are valid, and the files that it links to exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import validate

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]


def configs():
    """Yield the configs of all pages except the guides, whose configs `tests.docs` trains."""
    for page in PAGES:
        if page.parent == ROOT / "docs" / "guides":
            continue
        for number, block in enumerate(
            re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)
        ):
            yield pytest.param(block, id=f"{page.name}-{number}")


@pytest.mark.parametrize("block", list(configs()))
def test_config_in_documentation_is_valid(block):
    shown = json.loads(block if block.startswith("{") else f"{{{block}}}")
    whole = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}} | shown
    assert [problem for problem in validate(whole) if problem.severity != "note"] == []


def test_every_page_with_code_is_run_by_a_test():
    run_by_tests_docs = {"guides", "from"}  # and README.md
    doctests = {"schedules"}  # generated from docstrings, which `make check` runs
    missing = [
        page
        for page in PAGES
        if re.search(r"^ *```(python|console|pycon)", page.read_text(), re.MULTILINE)
        and page != ROOT / "README.md"
        and page.parent.name not in run_by_tests_docs | doctests
    ]
    assert missing == []


def test_every_statement_on_security_names_an_existing_test():
    rows = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if "::" in line]
    assert len(rows) > 10
    for row in rows:
        path, name = re.search(r"`(tests/\S+\.py)::(\w+)`", row).groups()
        assert f"def {name}(" in (ROOT / path).read_text()


def test_first_example_of_the_readme_trains_to_the_end_of_its_schedule(tmp_path):
    text = (ROOT / "README.md").read_text()
    config, code = (
        re.search(rf"```{language} title.*?\n(.*?)```", text, re.DOTALL)[1]
        for language in ("json", "python")
    )
    assert '"cycle_first_step_size": 1000' in config
    (tmp_path / "ds_config.json").write_text(config.replace("1000", "20"))
    (tmp_path / "train.py").write_text(code)
    command = [sys.executable, "train.py"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "checkpoints" / "global_step40").is_dir()


def read_anchors(page):
    """Return the anchors that code hosts give to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*?)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchor_in_documentation_points_to_a_heading(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text())
    dead = []
    for target, anchor in links:
        path = page.parent / target if target else page
        if path.suffix == ".md" and anchor not in read_anchors(path):
            dead.append(f"{target}#{anchor}")
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_in_documentation_points_to_an_existing_file(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []

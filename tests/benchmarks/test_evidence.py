"""The scripts of `make evidence`, run with a few samples and steps, and the pages of results."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.run import GROUPS, OUTPUT
from engine.config import validate

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "benchmarks" / "evidence"
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
COMMAND = re.compile(r"(?:python|torchrun [^`]*?) (benchmarks/\S+\.py|-m tests\.testing\.\w+)")


def run_smoke(command, directory):
    program, *arguments = shlex.split(command.replace(str(OUTPUT), str(directory)))
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments, "--smoke", "--seeds", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("path", sorted(EVIDENCE.rglob("*.json")), ids=lambda path: path.stem)
def test_config_of_evidence_is_valid(path):
    assert [problem for problem in validate(path) if problem.severity != "note"] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", GROUPS["evidence"], ids=lambda command: Path(command).stem)
def test_evidence_command_trains_and_writes_results(command, tmp_path):
    run_smoke(command, tmp_path)
    (stored,) = tmp_path.glob("*.json")
    assert len(json.loads(stored.read_text())["rows"]) >= 5
    assert stored.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_evidence_is_redrawn_without_training_and_keeps_the_text_of_its_page(tmp_path):
    (command,) = (each for each in GROUPS["evidence"] if "scale_schedule" in each)
    assert "cosine 2.0 0: " in run_smoke(command, tmp_path)
    page = tmp_path / "scale_schedule.md"
    page.write_text(
        f"# Title\n\n{page.read_text()}\nA conclusion.\n".replace("| cosine |", "| old |")
    )
    assert "cosine 2.0 0: " not in run_smoke(command, tmp_path)
    text = page.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\nA conclusion.\n")
    assert text.count("| cosine |") == 4
    assert "old" not in text


@pytest.mark.parametrize("page", RESULTS, ids=lambda page: page.stem)
def test_page_of_results_names_an_existing_command(page):
    text = page.read_text()
    scripts = COMMAND.findall(text)
    assert scripts or "make benchmark-gpu" in text or page.stem == "README"
    for script in scripts:
        path = script.removeprefix("-m ").replace(".", "/") + ".py" if "-m " in script else script
        assert (ROOT / path).is_file()


def test_every_script_of_evidence_belongs_to_make_evidence():
    scripts = {path.name for path in EVIDENCE.glob("*.py") if "from_arguments(" in path.read_text()}
    scripts.remove("experiment.py")
    assert len(scripts) >= 4
    assert all(any(script in command for command in GROUPS["evidence"]) for script in scripts)

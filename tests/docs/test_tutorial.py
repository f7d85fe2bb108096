"""The tutorial runs, and the outputs that it contains are those of the current code."""

import re
import subprocess
import sys

import nbformat
import pytest

from tests.docs.snippets import ROOT

STORED = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)


def list_outputs(notebook):
    """Return the kinds of the outputs of each code cell."""
    return [
        [(output.output_type, *output.get("data", {output.get("name"): ""})) for output in outputs]
        for outputs in (cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    ]


def join_text(notebook):
    """Return the text of all outputs in one line, because the terminal's width may differ."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = (
        output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs
    )
    return " ".join(word for text in texts for word in text.split())


@pytest.mark.slow
def test_tutorial_runs_and_has_the_stored_outputs(tmp_path):
    path = tmp_path / "tutorial.ipynb"
    subprocess.run(
        [sys.executable, ROOT / "tools" / "run_tutorial.py", "--output", path],
        check=True,
        timeout=500,
    )
    executed = nbformat.read(path, as_version=4)
    assert list_outputs(executed) == list_outputs(STORED)
    for text in (join_text(executed), join_text(STORED)):
        assert "Did you mean `gradient_clipping`?" in text
        starts = re.findall(r"starting at step (\d+) stopped at step (\d+)", text)
        assert starts == [("0", "100"), ("100", "230")]
        assert float(re.search(r"'accuracy': ([\d.]+)", text)[1]) > 0.95
        ranks, steps, accuracy = re.search(
            r"(\d) processes, (\d+) steps, accuracy ([\d.]+)", text
        ).groups()
        assert (ranks, steps) == ("2", "230")
        assert float(accuracy) > 0.95


def test_stored_tutorial_was_executed_from_top_to_bottom():
    cells = [cell for cell in STORED.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "error" not in {output.output_type for cell in cells for output in cell.outputs}


def test_stored_tutorial_contains_no_path_of_a_machine():
    assert re.findall(r"(?<![\w.<])/(?:home|root|tmp|usr|opt)/\S+", join_text(STORED)) == []

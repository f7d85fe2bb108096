"""The snippets of README.md run. tests/test_docs.py runs its first example."""

import io

import pytest

from engine.cli.main import main
from tests.docs.snippets import ROOT, Page, read_blocks, split_commands

README = ROOT / "README.md"
MISTAKE = """\
{
  "train_batch_size": 8,
  "optimizer": { "type": "AdamW" },
  "gradient_cliping": 1.0,
  "bf16": { "enabled": true }
}
"""
"""The config of which README.md shows the errors."""


@pytest.mark.slow
def test_every_snippet_of_the_readme_runs(directory):
    text = README.read_text()
    for block in read_blocks(README):
        if "error[" in block.text:  # the test below runs it
            text = text.replace(f"```{block.language}\n{block.text}```\n", "")
    path = directory / "README.md"
    path.write_text(text)
    page = Page(path, directory)
    assert page.run() == 4


def test_errors_in_the_readme_are_those_of_the_command(directory):
    (shown,) = (block for block in read_blocks(README) if "error[" in block.text)
    (directory / "ds_config.json").write_text(MISTAKE)
    ((command, *expected),) = split_commands(shown.text)
    output = io.StringIO()
    assert main(command.split()[1:], output) == 1
    assert output.getvalue().splitlines() == expected

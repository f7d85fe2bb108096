"""The snippets of README.md run, in the order of the page."""

import io

import pytest
import torch

from engine.cli.main import main
from tests.docs.snippets import NEW_MODEL, ROOT, Page, read_blocks, split_commands

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

START = """
trainer, *_ = engine.initialize(config="ds_config.json", model=model, training_data=dataset)
"""


class Readme(Page):
    """README.md, whose blocks use the trainer of the first example."""

    def _write_file(self, block):
        if block.title == "train.py":  # that of the guides
            blocks = read_blocks(self.path)
            block = next(each for each in blocks if each.language == "python")
            block = block._replace(title="train.py")
        super()._write_file(block)

    def _run_python(self, block):
        if "trainer." in block.text and "trainer" not in self.namespace:
            exec(NEW_MODEL + START, self.namespace)
        super()._run_python(block)


def compute_loss(batch):
    x, y = batch
    return torch.nn.functional.mse_loss(x.sum(dim=1), y.float())


@pytest.mark.slow
def test_every_snippet_of_the_readme_runs(directory):
    text = README.read_text().replace("1000", "20")  # a shorter schedule
    for block in read_blocks(README):
        if "error[" in block.text:  # the test below runs it
            text = text.replace(f"```{block.language}\n{block.text}```\n", "")
    (directory / "hostfile").write_text("a slots=2\nb slots=2\n")
    path = directory / "README.md"
    path.write_text(text)
    page = Readme(path, directory)
    page.namespace |= {"validation_loader": page.namespace["loader"], "compute_loss": compute_loss}
    assert page.run() >= 5


def test_errors_in_the_readme_are_those_of_the_command(directory):
    (shown,) = (block for block in read_blocks(README) if "error[" in block.text)
    (directory / "ds_config.json").write_text(MISTAKE)
    ((command, *expected),) = split_commands(shown.text)
    output = io.StringIO()
    assert main(command.split()[1:], output) == 1
    assert output.getvalue().splitlines() == expected

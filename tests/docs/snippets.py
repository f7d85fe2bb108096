"""Read the code blocks of a documentation page, and run them in the order of the page.

All untitled blocks of a page share a namespace, and a directory that contains a config and the
script ``train.py`` of the guide to several nodes:

- `python` runs. The names of `PRELUDE` exist; a block that calls `initialize` gets a new model.
- `json` is a part of a config. It becomes ``ds_config.json`` for the blocks that follow, and a
  model is trained by it.
- `console` runs the commands after ``$``; their output must contain the lines below them.

A block with a title, such as ``python title="my_module.py"``, is a file. It is only written.
"""

import io
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import engine
from engine.cli.main import main

PRELUDE = """
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import engine
import schedules

torch.manual_seed(0)
inputs = torch.randn(16, 8)
dataset = TensorDataset(inputs, (inputs.sum(1) > 0).long())
loader = DataLoader(dataset, batch_size=8)
loss_fn = nn.functional.cross_entropy


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)
"""
NEW_MODEL = """
model = Model()
optimizer = torch.optim.AdamW(model.parameters())
"""
ROOT = Path(__file__).parents[2]
LAUNCH_GUIDE = ROOT / "docs" / "guides" / "multi_node.md"
BASE_CONFIG = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}
STEPS = 2  # of the run that tests a config

NOT_RUN = {
    "make": "tests/test_docs.py and .ci/run cover the targets",
    "pip": "installs packages",
    "sbatch": "needs Slurm; tests/engine/launch covers it",
    "scancel": "needs Slurm",
    "srun": "needs Slurm; tests/engine/launch covers it",
    "torchrun": "starts processes; tests/engine/launch covers it",
}
"""Commands of which only the syntax is checked, with the reason."""


class Block(NamedTuple):
    """A fenced code block of a page."""

    language: str
    title: str
    text: str
    line: int


FENCE = re.compile(
    r'^(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^ *```$',
    re.DOTALL | re.MULTILINE,
)


def read_text_outside_blocks(page: Path) -> str:
    """Return the text of a Markdown page without its fenced code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def read_blocks(page: Path) -> list[Block]:
    """Return the fenced code blocks of a Markdown page, also those inside lists."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            found["title"] or "",
            re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE),
            text.count("\n", 0, found.start()) + 1,
        )
        for found in FENCE.finditer(text)
    ]


def find_file(title: str, page: Path) -> Block:
    """Return the block of a page that has this title."""
    (found,) = (block for block in read_blocks(page) if block.title == title)
    return found


def complete_config(text: str) -> dict:
    """Return the config of a block, which may be a part such as ``"engine": {…}``."""
    part = json.loads(text if text.lstrip().startswith("{") else f"{{{text}}}")
    sizes = {key for key in part if key.startswith("train_") or "accumulation" in key}
    base = {key: value for key, value in BASE_CONFIG.items() if key == "optimizer" or not sizes}
    return base | part


class Page:
    """A page whose blocks are run in a directory.

    The directory must be the working directory and the first entry of ``sys.path``.
    """

    def __init__(self, path: Path, directory: Path) -> None:
        self.path = path
        self.directory = directory
        self.namespace = {"__name__": "__main__"}
        exec(PRELUDE + NEW_MODEL, self.namespace)

    def run(self) -> int:
        """Run all blocks, and return their number."""
        blocks = read_blocks(self.path)
        self._write_config(json.dumps(BASE_CONFIG))
        self._write_file(find_file("train.py", LAUNCH_GUIDE))
        for block in blocks:
            runner = getattr(self, f"_run_{block.language}", None)
            try:
                if block.title:
                    self._write_file(block)
                elif runner is not None:
                    runner(block)
            except BaseException as error:
                error.add_note(f"in the block at {self.path}:{block.line}")
                raise
        self._end_runs()
        return len(blocks)

    def _run_python(self, block: Block) -> None:
        if "initialize(" in block.text:
            self._end_runs()
            exec(NEW_MODEL, self.namespace)
        place = f"{self.path}:{block.line}"
        exec(compile(block.text, place, "exec", dont_inherit=True), self.namespace)

    def _run_json(self, block: Block) -> None:
        self._end_runs()
        for directory in ("checkpoints", "deepspeed_checkpoints"):
            shutil.rmtree(self.directory / directory, ignore_errors=True)
        config = complete_config(block.text)
        problems = engine.validate(config)
        assert [problem for problem in problems if problem.severity != "note"] == []
        self._write_config(json.dumps(config))
        resolved = engine.load_config(config)
        # DeepSpeed and compiled models take seconds to start. Their own tests train them.
        if resolved.backend.name == "torch" and resolved.model.compile_backend is None:
            self._train(config)

    def _train(self, config: dict) -> None:
        exec(NEW_MODEL, self.namespace)
        names = self.namespace
        trainer, _, loader, _ = engine.initialize(
            config=config, model=names["model"], training_data=names["dataset"]
        )
        micro_batches = STEPS * trainer.gradient_accumulation_steps()
        for x, y in itertools.islice(itertools.cycle(loader), micro_batches):
            trainer.backward(names["loss_fn"](trainer(x), y))
            trainer.step()
        trainer.destroy()

    def _run_console(self, block: Block) -> None:
        for command, *expected in split_commands(block.text):
            printed = run_command(command)
            for line in expected:
                assert line.strip() in printed, f"{command!r} did not print {line!r}:\n{printed}"

    def _run_text(self, block: Block) -> None:
        """Text is output, or is run by no test."""

    def _run_bash(self, block: Block) -> None:
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)

    _run_sh = _run_bash

    def _write_file(self, block: Block) -> None:
        (self.directory / block.title).write_text(block.text)

    def _write_config(self, text: str) -> None:
        (self.directory / "ds_config.json").write_text(text)

    def _end_runs(self) -> None:
        for name, value in list(self.namespace.items()):
            if isinstance(value, engine.Engine):
                value.destroy()
                del self.namespace[name]


def split_commands(text: str) -> list[list[str]]:
    """Return each command of a console block with the lines of its output."""
    commands: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            commands.append([line[2:]])
        elif line.strip() not in {"", "…"}:
            commands[-1].append(line)
    return commands


def run_command(command: str) -> str:
    """Run a command of the documentation, and return its output.

    A launch only prints its plan, because the hosts do not exist.
    """
    name, *arguments = shlex.split(command, comments=True)
    if name in NOT_RUN:
        return ""
    if name == "python":
        return run_script(arguments)
    assert name == "onecycle", f"add {name!r} to NOT_RUN, with the reason"
    if arguments[0] == "launch" and "--write-sbatch" not in arguments:
        arguments.insert(1, "--dry-run")
    output = io.StringIO()
    with redirect_stdout(output):
        status = main(arguments, output)
    assert status == 0, f"{command!r} exited with status {status}:\n{output.getvalue()}"
    return output.getvalue()


def run_script(arguments: list[str]) -> str:
    """Run a script in this process, and return its output."""
    output, before = io.StringIO(), sys.argv
    sys.argv = arguments
    try:
        with redirect_stdout(output):
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.argv = before
    return output.getvalue()

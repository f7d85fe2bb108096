"""What mypy strict says of code that uses the packages: one run over all of it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

from schedules import SCHEDULES, Horizon
from schedules.core.fields import fields_of
from tests.typing import user_code

ROOT = Path(__file__).parents[2]
USER_CODE = Path(__file__).parent / "user_code.py"
EXAMPLES = sorted((ROOT / "examples").glob("**/*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES_OF_SNIPPETS = """
# mypy: disable-error-code="no-untyped-call"
# torch does not annotate Tensor.backward.
from collections.abc import Callable
from typing import Any

import engine
import schedules
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

model: nn.Module
backbone: list[nn.Parameter]
head: list[nn.Parameter]
dataset: Dataset[tuple[Tensor, Tensor]]
loader: DataLoader[tuple[Tensor, Tensor]]
loss_fn: Callable[[Tensor, Tensor], Tensor]
optimizer: Optimizer
"""


def call(name, **params):
    arguments = ", ".join(f"{key}={value!r}" for key, value in params.items())
    return f"schedules.{name}({arguments})"


def misspelled_call(name, cls):
    field = next(iter(fields_of(cls)))
    params = {key: value for key, value in cls.example.items() if key != field}
    return call(name, **params, **{field[:-1]: cls.example.get(field)})


def call_with_wrong_type(name, cls):
    field = next(iter(fields_of(cls)))
    return call(name, **(cls.example | {field: {}}))


def snippets():
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for index, code in enumerate(blocks):
            yield f"def {page.stem}_{index}() -> None:\n{indent(code, '    ')}"


@pytest.fixture(scope="module")
def flagged_lines(tmp_path_factory):
    """Return a function from a module's name to the lines that mypy flags, with the messages."""
    folder = tmp_path_factory.mktemp("typing")
    modules = {
        "correct_calls": [call(name, **cls.example) for name, cls in SCHEDULES.items()],
        "misspelled_calls": [misspelled_call(name, cls) for name, cls in SCHEDULES.items()],
        "calls_with_wrong_types": [
            call_with_wrong_type(name, cls) for name, cls in SCHEDULES.items()
        ],
    }
    texts = {name: "\n".join(["import schedules", *calls]) for name, calls in modules.items()}
    texts["snippets"] = "\n".join([NAMES_OF_SNIPPETS, *snippets()])
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text + "\n")
    files = [*sorted(folder.glob("*.py")), USER_CODE, *EXAMPLES]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-pretty", "--no-error-summary", *map(str, files)],
        cwd=ROOT,
        env=os.environ
        | {"MYPYPATH": os.pathsep.join(map(str, [ROOT, ROOT / "examples/fashion_mnist"]))},
        capture_output=True,
        text=True,
        check=False,  # mypy exits with 1: the modules have errors
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    errors = re.findall(r"^(\S+?)\.py:(\d+): error: (.*)$", run.stdout, re.MULTILINE)

    def lines_of(path):
        return {int(line): text for stem, line, text in errors if Path(stem).name == path}

    return lines_of


def test_mypy_correct_call_of_each_schedule_is_accepted(flagged_lines):
    assert flagged_lines("correct_calls") == {}


@pytest.mark.parametrize("module", ["misspelled_calls", "calls_with_wrong_types"])
def test_mypy_wrong_call_of_each_schedule_is_flagged(flagged_lines, module):
    assert list(flagged_lines(module)) == list(range(2, len(SCHEDULES) + 2))


@pytest.mark.parametrize("module", ["snippets", "user_code", *[each.stem for each in EXAMPLES]])
def test_mypy_code_that_users_copy_is_accepted(flagged_lines, module):
    assert flagged_lines(module) == {}


def test_user_code_runs():
    user_code.construct_with_time_strings_and_lists()
    user_code.resolve(Horizon(steps_per_epoch=10))

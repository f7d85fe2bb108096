"""Type checks with strict mypy of code that uses the packages, in a single run."""

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


def call(type_name, params):
    arguments = ", ".join(f"{name}={value!r}" for name, value in params.items())
    return f"schedules.{type_name}({arguments})"


def misspelled_call(type_name, cls):
    name = next(iter(fields_of(cls)))
    return call(type_name, {**cls.example, name[:-1]: cls.example.get(name)})


CALLS = {
    "correct_calls": [call(name, cls.example) for name, cls in SCHEDULES.items()],
    "misspelled_calls": [misspelled_call(name, cls) for name, cls in SCHEDULES.items()],
    "calls_with_wrong_types": [
        call(type_name, {**cls.example, name: {}})
        for type_name, cls in SCHEDULES.items()
        for name in fields_of(cls)
    ],
}


def snippets():
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for index, code in enumerate(blocks):
            yield f"def {page.stem}_{index}() -> None:\n{indent(code, '    ')}"


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Return the errors that mypy reports, each as (module name, line, message)."""
    directory = tmp_path_factory.mktemp("typing")
    texts = {name: "\n".join(["import schedules", *calls]) for name, calls in CALLS.items()}
    texts["snippets"] = "\n".join([NAMES_OF_SNIPPETS, *snippets()])
    for name, text in texts.items():
        (directory / f"{name}.py").write_text(text + "\n")
    files = [*sorted(directory.glob("*.py")), USER_CODE, *EXAMPLES]
    roots = [ROOT, *{example.parent for example in EXAMPLES}]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-pretty", "--no-error-summary", *map(str, files)],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": os.pathsep.join(map(str, roots))},
        capture_output=True,
        text=True,
        check=False,  # mypy exits with 1, because some modules contain errors on purpose
    )
    assert run.returncode == 1, run.stdout + run.stderr
    found = re.findall(r"^(\S+)\.py:(\d+): error: (.*)$", run.stdout, re.MULTILINE)
    return [(Path(stem).name, int(line), message) for stem, line, message in found]


@pytest.mark.parametrize(
    "module", ["correct_calls", "snippets", "user_code", *[each.stem for each in EXAMPLES]]
)
def test_mypy_correct_code_is_accepted(errors, module):
    assert [error for error in errors if error[0] == module] == []


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("misspelled_calls", "Unexpected keyword argument"),
        ("calls_with_wrong_types", "has incompatible type"),
    ],
)
def test_mypy_invalid_call_of_each_schedule_is_reported(errors, module, message):
    lines = {line for name, line, text in errors if name == module and message in text}
    assert lines == set(range(2, len(CALLS[module]) + 2))


def test_user_code_runs():
    user_code.construct_with_time_strings_and_lists()
    user_code.resolve(Horizon(steps_per_epoch=10))

"""Type checks with strict mypy of code that uses the packages, in a single run."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from textwrap import indent

import pytest

from schedules import SCHEDULES, Horizon
from schedules.core.fields import read_fields
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
import torch
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
trainer: engine.Engine
validation_loader: DataLoader[tuple[Tensor, Tensor]]
compute_loss: Callable[[Any], Tensor]
"""


def call(type_name, params):
    arguments = ", ".join(f"{name}={value!r}" for name, value in params.items())
    return f"schedules.{type_name}({arguments})"


def misspelled_call(type_name, cls):
    name = next(iter(read_fields(cls)))
    return call(type_name, {**cls.example, name[:-1]: cls.example.get(name)})


CALLS = {
    "correct_calls": [call(name, cls.example) for name, cls in SCHEDULES.items()],
    "misspelled_calls": [misspelled_call(name, cls) for name, cls in SCHEDULES.items()],
    "calls_with_wrong_types": [
        call(type_name, {**cls.example, name: {}})
        for type_name, cls in SCHEDULES.items()
        for name in read_fields(cls)
    ],
}


def snippets():
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for index, code in enumerate(blocks):
            yield f"def {page.stem}_{index}() -> None:\n{indent(code, '    ')}"


@pytest.fixture(scope="module")
def installed_python(tmp_path_factory):
    """Return the Python of a virtual environment in which the built wheel is installed."""
    directory = tmp_path_factory.mktemp("installed")
    for name in ("onecycle", "engine", "schedules", "schemas"):
        shutil.copytree(ROOT / name, directory / "source" / name)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", directory]
    subprocess.run([*pip, *options, directory / "source"], check=True, capture_output=True)
    venv.create(directory / "venv", with_pip=False, symlinks=True)
    (packages,) = (directory / "venv").glob("lib/python*/site-packages")
    (wheel,) = directory.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return directory / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def errors(tmp_path_factory, installed_python):
    """Return the errors that mypy reports, each as (module name, line, message)."""
    directory = tmp_path_factory.mktemp("typing")
    texts = {name: "\n".join(["import schedules", *calls]) for name, calls in CALLS.items()}
    texts["snippets"] = "\n".join([NAMES_OF_SNIPPETS, *snippets()])
    texts["user_code"] = USER_CODE.read_text()
    for name, text in texts.items():
        (directory / f"{name}.py").write_text(text + "\n")
    for example in EXAMPLES:
        shutil.copy(example, directory)
    settings = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    settings += ["--python-executable", installed_python, "--no-pretty", "--no-error-summary"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, *sorted(directory.glob("*.py"))],
        cwd=directory,
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

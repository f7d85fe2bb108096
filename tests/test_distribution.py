"""The sdist and the wheel: built from the checkout, installed elsewhere, and complete."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

import engine
import onecycle
import schedules
from schedules.core.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"


def list_files(*paths):
    done = subprocess.run(
        ["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def build(kind, source, target):
    subprocess.run(
        [sys.executable, "-c", BUILD.format(kind), str(target)],
        cwd=source, check=True, capture_output=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Return the paths of the sdist, built from a copy of the checkout, and of its wheel."""
    directory = tmp_path_factory.mktemp("distributions")
    for name in list_files():
        copy = directory / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    build("sdist", directory / "checkout", directory)
    (sdist,) = directory.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    build("wheel", directory / sdist.name.removesuffix(".tar.gz"), directory)
    (wheel,) = directory.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory):
    """Return the `bin` of a virtual environment with the wheel and the packages of this one."""
    directory = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    python = directory / "bin" / "python"
    (packages,) = (directory / "lib").glob("python*/site-packages")
    # A directory in a .pth file is searched last, and its own .pth files, such as that of an
    # editable installation of onecycle, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    done = subprocess.run(
        [*pip, "--no-deps", "--no-index", str(distributions[1])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return python.parent


def run(command, *arguments, cwd):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [command, *map(str, arguments)],
        cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_contains_every_file_of_the_packages(distributions):
    files = list_files("engine", "onecycle", "schedules", "schemas")
    # `make ui-bundle` builds the scripts in `static` from these sources.
    expected = {name for name in files if not name.startswith("engine/ui/source/")}
    with zipfile.ZipFile(distributions[1]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected


@pytest.mark.slow
def test_sdist_contains_what_the_readme_and_the_license_need(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "schemas/rules.json"} <= names


TRAIN = """
import engine, torch
config = {"train_batch_size": 4, "optimizer": {"type": "SGD"}, "scheduler": {"type": "OneCycle",
    "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 2}}}
trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
trainer.backward(trainer(torch.ones(4, 2)).mean())
trainer.step()
trainer.save_checkpoint("checkpoints")
print(engine.__file__, engine.__version__)
"""


@pytest.mark.slow
def test_installed_wheel_validates_plots_and_trains(environment, tmp_path):
    command = environment / "onecycle"
    config = tmp_path / "ds_config.json"
    shutil.copy(ROOT / "examples" / "fashion_mnist" / "ds_config.json", config)
    version = PYPROJECT["version"]
    assert run(command, "--version", cwd=tmp_path).startswith(f"onecycle {version}\n")
    assert run(command, "validate", config.name, cwd=tmp_path) == "ds_config.json: valid\n"
    run(command, "plot", config.name, "-t", cwd=tmp_path)
    json.loads(run(command, "schema", "--editor", cwd=tmp_path))
    assert "Megatron-LM:" in run(command, "schedules", cwd=tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    printed = run(environment / "python", "train.py", cwd=tmp_path).split()[-2:]
    assert printed == [printed[0], version]
    assert Path(printed[0]).is_relative_to(environment.parent)
    assert "global_step1" in run(command, "checkpoint", "ls", "checkpoints", cwd=tmp_path)


def test_version_is_the_same_everywhere():
    version = PYPROJECT["version"]
    assert engine.__version__ == schedules.__version__ == onecycle.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == version


def test_extras_in_the_code_are_those_of_pyproject():
    extras = PYPROJECT["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(re.match(rf"{package}\b", each) for each in extras[extra])
    required = {re.match(r"[\w-]+", each)[0] for each in PYPROJECT["dependencies"]}
    assert {"torch", "jsonschema", "deepspeed", "numpy"} <= required
    assert required.isdisjoint(EXTRAS)


def test_lower_bounds_are_the_oldest_tested_versions():
    extras = PYPROJECT["optional-dependencies"]
    bounds = [*PYPROJECT["dependencies"], *extras["plot"], *extras["tensorboard"], *extras["ui"]]
    required = dict(re.match(r"([\w-]+)>=([\d.]+)", each).groups() for each in bounds)
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(bound) for name, bound in required.items()} == {
        name: Version(version) for name, version in tested.items()
    }


def test_oldest_supported_python_is_the_tested_one():
    oldest = PYPROJECT["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in PYPROJECT["classifiers"]
    python = ROOT / "tools" / "check_python.py"
    assert run(sys.executable, python, "python3", cwd=ROOT) == ""
    old = "import sys; sys.version_info = (3, 9, 2); import runpy; sys.argv = ['', 'python3']\n"
    old += f"runpy.run_path({str(python)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"requires Python {oldest} or newer, but `python3` is Python 3.9" in done.stdout


def test_pre_commit_hooks_run_the_programs_of_make_check():
    hooks = re.findall(r"entry: (\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    assert len(hooks) == 6
    assert all(f"$(BIN)/{Path(entry).name}" in makefile for entry in hooks)

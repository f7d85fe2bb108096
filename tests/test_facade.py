"""The package `onecycle`, and the command in projects with modules that have our names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import engine
import onecycle

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "examples" / "fashion_mnist" / "ds_config.json"
MODULES = ("engine.py", "schedules.py", "schemas/__init__.py")
CONSOLE_SCRIPT = "import sys\nfrom onecycle.__main__ import main\nsys.exit(main())\n"


def run_python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip


def rename(path):
    path.rename(path.with_stem(f"my_{path.stem}"))


@pytest.fixture
def project(tmp_path):
    """Return a directory with modules that have the names of our packages."""
    directory = tmp_path / "project"
    (directory / "schemas").mkdir(parents=True)
    for module in MODULES:
        (directory / module).write_text(f"print('the project imports {module}')\n")
    return directory


@pytest.mark.parametrize("command", ["module", "console script"])
def test_command_imports_no_module_of_the_working_directory(project, command):
    start = ("-m", "onecycle")
    if command == "console script":
        start = (project.parent / "onecycle_script.py",)
        start[0].write_text(CONSOLE_SCRIPT)
    done = run_python(*start, "validate", CONFIG, cwd=project)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{CONFIG}: valid\n"


def test_command_runs_in_a_checkout_that_is_not_installed():
    done = run_python("-S", "-m", "onecycle", "--help", cwd=ROOT, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "usage: onecycle" in done.stdout


@pytest.mark.slow
def test_launch_only_the_script_imports_modules_of_its_directory(project):
    (project / "beside.py").write_text("print('the script imports beside.py')\n")
    (project / "train.py").write_text("import beside, engine\n")
    options = ("--nproc", 1, "--bind-cores", "--console", "all")
    done = run_python("-m", "onecycle", "launch", *options, "train.py", cwd=project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the script imports beside.py") == 1
    assert done.stdout.count("the project imports engine.py") == 1
    assert done.stdout.count("the project imports") == 1


@pytest.mark.parametrize(
    ("imported", "name"),
    [
        ("onecycle", "engine"),
        ("onecycle", "schedules"),
        ("engine", "schedules"),
        ("engine", "schemas"),
    ],
)
def test_import_names_the_module_that_has_the_name_of_a_package(project, imported, name):
    paths = {path.stem: path for path in project.iterdir()}
    own = paths.pop(name)
    for path in paths.values():
        rename(path)
    (project / "train.py").write_text(f"import {imported}\n")
    done = run_python("train.py", cwd=project)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: Python imports {own} instead of onecycle's package `{name}`. Rename this "
        f"file or directory, for example to `my_{name}`."
    )
    rename(own)
    assert run_python("train.py", cwd=project).returncode == 0


def test_import_after_the_users_module_of_the_same_name_is_an_error(project):
    (project / "train.py").write_text("import engine\nimport onecycle\n")
    done = run_python("train.py", cwd=project)
    assert f"Python imports {project / 'engine.py'} instead of" in done.stderr


DEEPSPEED_NAMES = """
import sys
import {package} as deepspeed
listed = set(dir(deepspeed))
assert "zero" not in listed and "DeepSpeedEngine" not in listed
assert deepspeed.DeepSpeedEngine is deepspeed.Engine
assert deepspeed.DeepSpeedConfigError is deepspeed.ConfigError
assert deepspeed.__version__ == "{version}"
assert "deepspeed" not in sys.modules
import deepspeed as real
names = "comm get_accelerator init_distributed checkpointing ops PipelineModule utils version zero"
for name in names.split():
    assert getattr(deepspeed, name) is getattr(real, name), name
from {package} import zero
assert not real.ops.__compatible_ops__["deepspeed_shm_comm"]  # not compiled on first use
"""


@pytest.mark.parametrize("package", ["engine", "onecycle"])
def test_package_imported_as_deepspeed_has_its_names(package, tmp_path):
    code = DEEPSPEED_NAMES.format(package=package, version=engine.__version__)
    done = run_python("-c", code, cwd=tmp_path, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr


def test_deepspeed_name_without_deepspeed_raises_an_error_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it raises ImportError
    with pytest.raises(ImportError, match="`zero` requires DeepSpeed, but importing"):
        _ = engine.zero
    with pytest.raises(AttributeError, match="module 'onecycle' has no attribute 'nonsense'"):
        _ = onecycle.nonsense

"""The public names of the packages, and the libraries that they must not import."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import engine
import onecycle
import schedules

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "deepspeed", "matplotlib", "plotext", "rich", "scipy", "pandas"}

ENGINE_NAMES = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "Engine",
    "LRRangeReport",
    "MisuseError",
    "Problem",
    "__version__",
    "add_config_arguments",
    "add_schedule_arguments",
    "initialize",
    "load_config",
    "lr_range_test",
    "register_with_deepspeed",
    "validate",
]
ONECYCLE_NAMES = [*ENGINE_NAMES, "schedules"]
SCHEDULES_NAMES = [
    "FeedbackSchedule",
    "Horizon",
    "SCHEDULES",
    "Schedule",
    "ScheduleBinder",
    "ScheduleError",
    "__version__",
    "attach",
    "from_config",
    "plot",
    "register",
    "trace",
] + [schema.stem for schema in (ROOT / "schemas/schedulers").glob("*.json")]

VALIDATE = """
import engine, onecycle, schedules
assert "Engine" in dir(engine) and "Engine" in dir(onecycle) and "attach" in dir(schedules)
scheduler = {"type": "WarmupLR", "params": {"warmup_type": "linear"}}
config = {"train_batch_size": 8, "scheduler": scheduler}
assert engine.validate(config) == []
engine.load_config(config)
"""
COMMANDS = """
import io
from engine.cli.main import main
assert main(["validate", "%(config)s"], io.StringIO()) == 0
assert main(["schema", "OneCycle"], io.StringIO()) == 0
assert main(["plot", "%(config)s", "--csv", "-"], io.StringIO()) == 0
"""


@pytest.mark.parametrize("code", [VALIDATE, COMMANDS], ids=["library", "command"])
def test_validate_schema_and_csv_import_no_large_library(code):
    code %= {"config": ROOT / "examples/fashion_mnist/ds_config.json"} if "%" in code else ()
    code += (
        "\nimport json, sys; print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(json.loads(run.stdout.splitlines()[-1]))
    assert loaded.isdisjoint(HEAVY | {"numpy"})


@pytest.mark.parametrize(
    ("package", "names"),
    [(engine, ENGINE_NAMES), (onecycle, ONECYCLE_NAMES), (schedules, SCHEDULES_NAMES)],
)
def test_package_public_names_are_listed_documented_and_importable(package, names):
    assert package.__all__ == sorted(names)
    assert set(names) <= set(dir(package))
    imported = {}
    exec(f"from {package.__name__} import *", imported)
    for name in names:
        assert imported[name] == getattr(package, name)
        assert imported[name].__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018  # the access is the test


def test_import_changes_no_global_state():
    code = (
        "import logging, os, signal, sys\n"
        "before = dict(os.environ), logging.root.handlers[:], sys.excepthook\n"
        "import engine, engine.config, onecycle, schedules, schemas\n"
        "assert before == (dict(os.environ), logging.root.handlers[:], sys.excepthook)\n"
        "assert not logging.getLogger('onecycle').handlers\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", [engine, onecycle, schedules])
def test_package_stays_small_at_the_top_and_in_every_file(package):
    root = Path(package.__file__).parent
    assert len(list(root.glob("*.py"))) <= 6
    for path in root.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path


def public_names(cls):
    for statement in cls.body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                if not name.startswith("_"):
                    yield name


@pytest.mark.parametrize("package", [engine, onecycle, schedules])
def test_classes_have_at_most_25_public_names(package):
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # `DeepSpeedAccessors` repeats the names of DeepSpeed's engine.
            if isinstance(node, ast.ClassDef) and node.name != "DeepSpeedAccessors":
                assert len(set(public_names(node))) <= 25, (path, node.name)

"""Code that a config names: commands that only read a config never import or run it."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine
from engine.cli.main import main
from engine.config.named_code import find_named_code
from schedules import from_config
from schedules.core.imports import ImportForbiddenError, check_import_path, imports_allowed
from schedules.core.registry import read_torch_parameters

MODULE = "named_by_a_config"


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Put a module and a package on the path; importing either leaves a trace in sys.modules."""
    (tmp_path / f"{MODULE}.py").write_text(
        "def half(step):\n    return 0.5\n\ndef floor(step, bound, least=0):\n    return least\n"
    )
    package = tmp_path / f"{MODULE}_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "below.py").write_text("def half(step):\n    return 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(MODULE)]:
        del sys.modules[name]


def config_of(block):
    optimizer = {"type": "SGD", "params": {"lr": 0.5}}
    return {"train_batch_size": 8, "optimizer": optimizer, "scheduler": block}


def nest(block):
    return {"type": "SequentialLR", "params": {"schedulers": [block, block], "milestones": [5]}}


BLOCKS = [
    {"type": f"{MODULE}:half"},
    {"type": f"{MODULE}_package.below:half"},
    {"type": "LambdaLR", "params": {"lr_lambda": f"{MODULE}:half"}},
    {"type": "LambdaLR", "params": {"lr_lambda": [f"{MODULE}_package.below:half"]}},
]
BLOCKS += [nest(block) for block in BLOCKS]


@pytest.mark.parametrize("block", BLOCKS, ids=json.dumps)
@pytest.mark.parametrize("command", ["validate", "config", "plot"])
def test_commands_never_import_what_a_config_names(tmp_path, command, block):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config_of(block)))
    out = io.StringIO()
    status = main([command, str(path)], out, io.StringIO())
    assert status == (1 if command == "plot" else 0)
    assert command == "config" or "--allow-imports" in out.getvalue()
    assert not any(name.startswith(MODULE) for name in sys.modules)


def test_validate_checks_all_files_after_one_that_names_code(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    block = {"type": "LambdaLR", "params": {"lr_lambda": "os:_exit"}}
    first.write_text(json.dumps(config_of(block)))
    second.write_text('{"train_batch_size": 0}')
    out = io.StringIO()
    assert main(["validate", str(first), str(second)], out, io.StringIO()) == 1
    assert "b.json: 1 error" in out.getvalue()


@pytest.mark.parametrize("block", BLOCKS, ids=json.dumps)
def test_commands_import_named_code_if_allowed(tmp_path, block):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config_of(block)))
    for command in (["validate"], ["config"], ["plot", "--csv", "-", "--steps", "2"]):
        out = io.StringIO()
        assert main([*command, str(path), "--allow-imports"], out, io.StringIO()) == 0
        assert "named-code" not in out.getvalue()
    assert out.getvalue() == "step,lr\n0,0.25\n1,0.25\n"


@pytest.mark.parametrize(
    ("path", "severity"),
    [
        (f"{MODULE}:half", "note"),
        ("no_such_module:half", "warning"),
        (f"{MODULE}_package.nothing:half", "warning"),
        ("not a path:half", "error"),
        (f"{MODULE}:", "error"),
        ("../x:half", "error"),
    ],
)
def test_validate_named_code_is_checked_by_form_and_file(path, severity):
    for block in ({"type": path}, {"type": "LambdaLR", "params": {"lr_lambda": path}}):
        (problem,) = engine.validate(config_of(block))
        assert (problem.rule, problem.severity) == ("named-code", severity)


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [("found_here", 0, "cannot be checked without an import"), ("no_code", 1, "was not found")],
)
def test_validate_finds_the_modules_that_an_import_finds(tmp_path, monkeypatch, name, status, text):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config_of({"type": f"{name}:half"})))
    (tmp_path / "found_here.py").write_text("def half(step):\n    return 0.5\n")
    (tmp_path / "no_code").mkdir()
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    assert main(["validate", str(path)], out) == 0
    assert text in out.getvalue()
    assert main(["validate", str(path), "--allow-imports"], io.StringIO()) == status


def test_validate_param_names_of_a_torch_scheduler_are_checked_without_torch():
    block = {"type": "LambdaLR", "params": {"lr_lambd": 1}}
    (problem,) = engine.validate(config_of(block))
    assert "Did you mean `lr_lambda`?" in problem.hint
    with imports_allowed(True):
        assert read_torch_parameters("CyclicLR").keys() == {
            "base_lr", "max_lr", "step_size_up", "step_size_down", "mode", "gamma", "scale_fn",
            "scale_mode", "cycle_momentum", "base_momentum", "max_momentum",
        }  # fmt: skip


def test_validate_other_params_beside_named_code_are_still_checked():
    block = nest({"type": f"{MODULE}:half"})
    block["params"]["schedulers"].append({"type": "StepLR", "params": {"step_siz": 3}})
    rules = [problem.rule for problem in engine.validate(config_of(block))]
    assert rules == ["schedule", "named-code", "named-code"]


def test_find_imported_module_still_requires_permission():
    """The function would be called, so it must not matter that its module is imported already."""
    block = {"type": f"{MODULE}:half"}
    from_config(block)
    with imports_allowed(False), pytest.raises(ImportForbiddenError):
        from_config(block)
    assert check_import_path(f"{MODULE}:half")
    assert [code.pointer for code in find_named_code(nest(block))] == [
        "/scheduler/params/schedulers/0/type",
        "/scheduler/params/schedulers/1/type",
    ]


def test_initialize_imports_named_code_and_logs_it(caplog):
    caplog.set_level(logging.INFO, "onecycle")
    engine.initialize(config=config_of(BLOCKS[0]), model=torch.nn.Linear(2, 1))
    assert f"imported {MODULE}:half" in caplog.text


def test_load_config_names_the_missing_attribute_and_the_missing_params():
    with pytest.raises(engine.ConfigError, match=rf"module '{MODULE}' has no attribute 'hal'"):
        engine.load_config(config_of({"type": f"{MODULE}:hal"}))
    with pytest.raises(engine.ConfigError, match=r"Missing key `bound`"):
        engine.load_config(config_of({"type": f"{MODULE}:floor"}))
    with pytest.raises(engine.ConfigError, match=r"Did you mean `least`"):
        block = {"type": f"{MODULE}:floor", "params": {"bound": 1, "leest": 2}}
        engine.load_config(config_of(block))


def test_script_finds_named_code_beside_itself(tmp_path):
    """Not in the working directory, which is elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "train.py"
    script.write_text(
        "import engine\n"
        f"config = engine.load_config({config_of(BLOCKS[0])!r})\n"
        "print(config.schedule(3, lr=1.0))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(Path(engine.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0.5\n"

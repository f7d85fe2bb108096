"""The registry: registering schedules, and errors for unknown names and failing imports."""

import re

import pytest

import schedules
from engine import ConfigError, validate
from schedules import Schedule, from_config, register
from schedules.core.descriptions import read_descriptions
from schedules.core.registry import find

CLASS = """
import dataclasses
from schedules import Schedule
from schedules.core.curves import constant

@dataclasses.dataclass(frozen=True, kw_only=True)
class Level(Schedule):
    value: float = 0.5

    def curves(self, base):
        return {"lr": tuple(constant(self.value) for _ in base["lr"])}
"""


@pytest.fixture(autouse=True)
def _no_new_schedules():
    before = set(schedules.SCHEDULES)
    yield
    for name in set(schedules.SCHEDULES) - before:
        del schedules.SCHEDULES[name]


@pytest.mark.parametrize("module", [None, "__main__", __name__], ids=str)
def test_register_class_without_readable_source_accepts_it(module):
    namespace = {} if module is None else {"__name__": module}
    exec(CLASS, namespace)
    cls = register(namespace["Level"])
    assert from_config({"type": "Level", "params": {"value": 0.25}}) == cls(value=0.25)
    assert read_descriptions(cls) == {"value": ""}


def test_from_config_class_without_field_description_is_rejected(tmp_path, monkeypatch):
    (tmp_path / "undescribed_level.py").write_text(CLASS)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="docstring below it. Add a docstring to: value"):
        from_config({"type": "undescribed_level:Level"})


def test_register_subclass_of_a_known_schedule_inherits_its_descriptions():
    namespace = {"OneCycle": schedules.OneCycle}
    exec("class Twin(OneCycle): pass", namespace)
    assert read_descriptions(namespace["Twin"]) == read_descriptions(schedules.OneCycle)


@pytest.mark.parametrize("cls", schedules.SCHEDULES.values(), ids=schedules.SCHEDULES)
def test_read_descriptions_of_known_schedules_are_complete(cls: type[Schedule]):
    assert all(read_descriptions(cls).values())


def blocks(path):
    """Return blocks that import a path: one as the schedule type, one as a parameter."""
    return [{"type": path}, {"type": "LambdaLR", "params": {"lr_lambda": path}}]


@pytest.mark.parametrize("block", blocks("no_such_module:Level"), ids=["type", "parameter"])
def test_import_missing_module_names_pythonpath(block):
    with pytest.raises(ValueError, match="no module 'no_such_module'.*PYTHONPATH"):
        from_config(block)


@pytest.mark.parametrize("index", [0, 1], ids=["type", "parameter"])
@pytest.mark.parametrize(
    ("source", "reason", "line"),
    [
        ("import os\nimport no_such_package\n", "ModuleNotFoundError: No module named", 2),
        ("from math import no_such_name\n", "ImportError: cannot import name 'no_such_name'", 1),
        ("x = 1\ndef broken(:\n", "SyntaxError", 2),
        ("x = 1\ny = 2\nraise RuntimeError('no data')\n", "RuntimeError: no data", 3),
    ],
)
def test_import_failing_module_names_its_error_and_line(
    tmp_path, monkeypatch, index, source, reason, line
):
    name = f"failing_{abs(hash(source))}"
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        from_config(blocks(f"{name}:Level")[index])
    message = str(error.value)
    assert reason in message
    assert f"{path}, line {line}" in message
    assert "PYTHONPATH" not in message


def test_import_failing_module_chains_the_traceback(tmp_path, monkeypatch):
    (tmp_path / "failing_at_once.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        from_config({"type": "failing_at_once:Level"})
    cause = error.value.__cause__
    assert cause is not None
    assert isinstance(cause.__cause__, ZeroDivisionError)


def test_import_missing_attribute_names_it():
    with pytest.raises(ValueError, match="module 'math' has no attribute 'nothing'"):
        from_config({"type": "math:nothing"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("num_steps", "warmup_num_steps"),
        ("warmup_steps", "warmup_num_steps"),
        ("warmup_typ", "warmup_type"),
        ("momentum", None),
    ],
)
def test_from_config_suggests_the_same_name_as_validate(name, meant):
    block = {"type": "WarmupLR", "params": {name: 10}}
    optimizer = {"type": "AdamW", "params": {"lr": 0.1}}
    config = {"train_batch_size": 8, "optimizer": optimizer, "scheduler": block}
    with pytest.raises(ValueError) as raised:
        from_config(block)
    found = re.search(r"Did you mean `(\w+)`", str(raised.value))
    assert (found and found[1]) == meant
    try:
        problems = validate(config)
    except ConfigError as error:
        problems = error.problems
    hints = [re.search(r"(?:Did you mean|Use) `(\w+)`", problem.hint) for problem in problems]
    assert [hint[1] for hint in hints if hint] == ([meant] if meant else [])


def test_read_descriptions_of_a_wrapped_torch_scheduler_name_its_class():
    assert read_descriptions(find("LambdaLR")) == {"lr_lambda": "Passed to LambdaLR."}

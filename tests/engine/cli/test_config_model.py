"""``onecycle config --model`` prints the param groups of a model."""

import json
import sys

import pytest

from engine.distributed.environment import INVALID, OK, USAGE
from tests.testing.command_line import run

MODULE = """
import torch

built_on = []

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(12))
        self.head = torch.nn.Linear(4, 2)

class ReadsItsWeights(Net):
    def __init__(self):
        super().__init__()
        built_on.append(self.head.weight.device.type)
        self.norm = self.head.weight.sum().item()

def build():
    return Net()

def build_number():
    return 3

def needs(size):
    return Net()

MODEL = Net()
"""


@pytest.fixture
def model_file(tmp_path, monkeypatch):
    (tmp_path / "net_for_config.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "net_for_config"
    sys.modules.pop("net_for_config", None)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "ds_config.json"
    own = {"params": "head", "lr": 0.5, "scheduler": {"type": "not_imported:schedule"}}
    optimizer = {"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.1}, "no_decay": True}
    optimizer["param_groups"] = [own]
    path.write_text(json.dumps({"train_batch_size": 8, "optimizer": optimizer}))
    return path


@pytest.mark.parametrize("name", ["Net", "build", "MODEL"])
def test_config_with_a_model_prints_its_param_groups(model_file, config, name):
    path = list(sys.path)
    status, out, err = run("config", config, "--model", f"{model_file}:{name}")
    assert (status, err) == (OK, "")
    values, _, groups = out.partition("\n\n")
    assert values + "\n" == run("config", config)[1]
    assert [line.split() for line in groups.splitlines()] == [
        line.split()
        for line in (
            (
                "param group 0 head lr 0.5, weight_decay 0.1, not_imported:schedule 1 parameter, "
                "8 elements: head.weight"
            ),
            (
                "param group 1 head, no decay lr 0.5, weight_decay 0, not_imported:schedule "
                "1 parameter, 2 elements: head.bias"
            ),
            (
                "param group 2 default lr 0.1, weight_decay 0.1 12 parameters, 192 elements: "
                "body.0-11.weight"
            ),
            (
                "param group 3 default, no decay lr 0.1, weight_decay 0 12 parameters, "
                "48 elements: body.0-11.bias"
            ),
        )
    ]
    assert sys.path == path


def test_config_with_a_model_that_reads_its_weights_builds_it_again(model_file, config):
    status, out, _ = run("config", config, "--model", f"{model_file}:ReadsItsWeights")
    assert status == OK
    assert "head.weight" in out
    assert sys.modules[model_file].built_on == ["meta", "cpu"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Missing", "has no attribute 'Missing'"),
        ("build_number", "returns a value of type int"),
        ("needs", "failed with TypeError: needs() missing"),
    ],
)
def test_config_with_a_wrong_model_is_wrong_usage(model_file, config, name, message):
    status, out, err = run("config", config, "--model", f"{model_file}:{name}")
    assert (status, out) == (USAGE, "")
    assert message in err


def test_config_with_a_pattern_that_matches_nothing_names_near_parameters(model_file, config):
    config.write_text(config.read_text().replace('"head"', '"haed"'))
    status, out, err = run("config", config, "--model", f"{model_file}:Net")
    assert (status, out) == (USAGE, "")
    assert "Similar names: `head`" in err


def test_config_with_a_model_but_without_an_optimizer_is_wrong_usage(model_file, tmp_path):
    path = tmp_path / "empty.json"
    path.write_text('{"train_batch_size": 8}')
    assert run("config", path, "--model", f"{model_file}:Net")[0] == USAGE
    path.write_text("{")
    assert run("config", path, "--model", f"{model_file}:Net")[0] == INVALID

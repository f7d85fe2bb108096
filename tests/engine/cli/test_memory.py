"""``onecycle memory`` prints the estimate as tables or as JSON."""

import json
import re
import sys
from pathlib import Path

import pytest

from engine.distributed.environment import INVALID, OK, USAGE
from tests.testing.command_line import run

MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(100, 100, bias=False) for _ in range(4))
        self.head = torch.nn.Linear(100, 10, bias=False)
        self.head.requires_grad_(False)

def empty():
    return torch.nn.ReLU()
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "ds_config.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    values = {"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": zero}
    path.write_text(json.dumps(values | {"optimizer": {"type": "AdamW"}}))
    return path


@pytest.fixture
def model_file(tmp_path, monkeypatch):
    (tmp_path / "net_for_memory.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "net_for_memory"
    sys.modules.pop("net_for_memory", None)


def test_memory_prints_the_parts_and_every_stage(config):
    status, out, err = run("memory", config, "--params", "7e9", "--world-size", 8)
    assert (status, err) == (OK, "")
    first, *rows = out.splitlines()
    assert first == (
        f"{config}: 7,000,000,000 parameters; DeepSpeed, ZeRO stage 3, 8 ranks, bf16, AdamW"
    )
    (chosen,) = (row for row in rows if "this config" in row)
    assert "optimizer" in chosen
    assert chosen.split()[0] == "3"
    assert "Not counted: activations" in out
    assert max(map(len, rows)) <= 100


def test_memory_as_json_has_the_bytes_of_each_part(config):
    status, out, _ = run("memory", config, "--params", 1000, "--world-size", 2, "--format", "json")
    found = json.loads(out)
    assert status == OK
    assert (found["stage"], found["offload_optimizer"], found["backend"]) == (3, "cpu", "deepspeed")
    total = sum(part["step"] for part in found["parts"] if part["device"] == "CPU")
    assert total == found["peak"]["CPU"] == 500 * (4 + 8 + 2 + 4)
    assert len(found["stages"]) == 8


def test_memory_of_a_model_counts_its_shapes_and_frozen_parameters(config, model_file):
    config.write_text('{"train_batch_size": 8, "engine": {"backend": "torch", "device": "cpu"}}')
    status, out, _ = run("memory", config, "--model", f"{model_file}:Net", "--format", "json")
    found = json.loads(out)
    assert (status, found["parameters"]) == (OK, 41_000)
    assert found["peak"] == {"CPU": 40_000 * 16 + 1000 * 4}
    assert found["notes"][0] == "The config has no optimizer, so AdamW is assumed."
    shown = run("memory", config, "--model", f"{model_file}:Net")[1]
    assert "41,000 parameters (40,000 trainable)" in shown


def test_memory_of_a_model_without_parameters_is_an_error(config, model_file):
    status, _, err = run("memory", config, "--model", f"{model_file}:empty")
    assert status == USAGE
    assert "has no parameters" in err


@pytest.mark.parametrize("count", ["many", "0", "1.5", "1e30"])
def test_memory_rejects_a_count_that_is_not_a_whole_number(config, count, capsys):
    with pytest.raises(SystemExit):
        run("memory", config, "--params", count)
    assert "must be a whole number" in capsys.readouterr().err


def test_memory_of_an_invalid_config_prints_its_problems(config):
    config.write_text('{"train_batch_size": 0}')
    status, out, _ = run("memory", config, "--params", "1e6")
    assert status == INVALID
    assert "`train_batch_size`" in out


def test_documentation_shows_the_output_of_the_command(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs/guides/memory.md").read_text()
    config = re.search(r"```json\n(.*?)```", page, re.DOTALL)[1]
    command, shown = re.search(r"```console\n\$ onecycle (.*?)\n(.*?)```", page, re.DOTALL).groups()
    (tmp_path / "ds_config.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(*command.split())
    assert status == OK
    assert [line.rstrip() for line in out.splitlines()] == shown.splitlines()

"""Test that a file in another format is reported as one problem that names the format."""

import json

import pytest

from engine import ConfigError
from engine.config import load_document
from engine.config.parser import parse
from engine.config.validate import check

ACCELERATE = """# written by accelerate config
compute_environment: LOCAL_MACHINE
deepspeed_config:
  deepspeed_config_file: ds.json
distributed_type: DEEPSPEED
"""


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (ACCELERATE, "an Accelerate config"),
        ('{"distributed_type": "DEEPSPEED", "num_processes": 2}', "an Accelerate config"),
        ("---\ntrain_batch_size: 8\nfp16:\n  enabled: true\n", "looks like YAML"),
        ("train_batch_size: 8", "looks like YAML"),
        ("train_batch_size = 8", "looks like TOML"),
        ("# a\n\n[fp16]  # b\nenabled = true\n", "looks like TOML"),
        ("output_dir = 'x'\nnum_train_epochs = 3\n", "Hugging Face TrainingArguments"),
        ("output_dir: x\nlearning_rate: 1e-4\n", "Hugging Face TrainingArguments"),
        ('{"per_device_train_batch_size": 8, "fp16": true, "learning_rate": 1}', "Hugging Face"),
        (
            '{"deepspeed": {"train_batch_size": 8}, "output_dir": "x", "report_to": []}',
            "`deepspeed`",
        ),
        ('{"model": "gpt2", "ds_config": {"zero_optimization": {"stage": 2}}}', "`ds_config`"),
    ],
)
def test_config_of_another_program_is_one_problem(text, named):
    (problem,) = check(parse(text, "f"), None)
    assert problem.severity == "error"
    assert named in problem.message


@pytest.mark.parametrize(
    "text",
    [
        '{train_batch_size: "8"}',
        '# a\n{"a": 1}',
        "[1]",
        "[null]\n",
        "8",
        "a b",
        'a = {"b": 1}',
        "a =",
    ],
)
def test_json_and_hjson_are_not_recognized_as_yaml_or_toml(text):
    assert not any("looks like" in problem.message for problem in parse(text, "f").problems)


@pytest.mark.parametrize(
    "config",
    [
        {"train_batch_size": 8, "learning_rate": 0.1, "num_train_epochs": 3},
        {"learning_rate": 0.1, "weight_decay": 0.1},
        {"num_train_epochs": 3},
        {"train_batch_size": 8, "deepspeed": {"zero_optimization": {}}},
        {"deepspeed": "ds_config.json"},
        {"ds_config": {"stage": 2}},
    ],
)
def test_unknown_keys_of_a_deepspeed_config_are_reported_one_by_one(config):
    problems = check(parse(json.dumps(config), "f"), None)
    unknown = {problem.pointer[1:] for problem in problems if problem.rule == "unknown-key"}
    assert unknown == config.keys() - {"train_batch_size"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_file_is_named_as_such(tmp_path, encoding):
    path = tmp_path / "ds.json"
    path.write_bytes(json.dumps({"train_batch_size": 8}).encode(encoding))
    with pytest.raises(ConfigError, match="UTF-16. Save the file as UTF-8"):
        load_document(path)

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
    ],
)
def test_config_of_another_program_is_one_problem(text, named):
    (problem,) = check(parse(text, "f"), None)
    assert problem.severity == "error"
    assert named in problem.message


@pytest.mark.parametrize("text", ['{train_batch_size: "8"}', '# a\n{"a": 1}', "[1]", "8", "a b"])
def test_json_and_hjson_are_not_recognized_as_yaml(text):
    assert not any("YAML" in problem.message for problem in parse(text, "f").problems)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_file_is_named_as_such(tmp_path, encoding):
    path = tmp_path / "ds.json"
    path.write_bytes(json.dumps({"train_batch_size": 8}).encode(encoding))
    with pytest.raises(ConfigError, match="UTF-16. Save the file as UTF-8"):
        load_document(path)

"""Test the iteration over the config schema, and the defaults of absent keys."""

from functools import partial

import pytest

import schemas
from engine.backends.deepspeed_config import build_deepspeed_config
from engine.config import load_config, load_document
from engine.config.pointers import is_within, join_pointer
from engine.config.provenance import trace_origins
from engine.config.schema import ABSENT, SCHEMA, SECTION, get_default, means_default, walk
from engine.config.validate import examine
from tests.testing.corpus import INDEX, path_of


def walk_pointers(value, **how):
    return [member.pointer for member in walk(value, schemas.read(SCHEMA), **how)]


def test_walk_yields_given_keys_in_order_without_ignored_keys():
    config = {"fp16": {"x-note": 1, "enabled": True}, "//": 2, "train_batch_size": 8}
    assert walk_pointers(config) == ["/fp16", "/fp16/enabled", "/train_batch_size"]


def test_walk_chooses_the_schema_of_params_by_type():
    config = {
        "optimizer": {"type": "adamw", "params": {"lr": 0.1}},
        "scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": 0.1}},
    }
    members = {member.pointer: member.schema for member in walk(config, schemas.read(SCHEMA))}
    assert members["/optimizer/params/lr"]["x-auto"] == "transformers"
    assert "minimum" in members["/scheduler/params/cycle_max_lr"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ([3], []),
        ({"optimizer": {"type": []}}, ["/optimizer", "/optimizer/type"]),
        (
            {"scheduler": {"type": "no", "params": 3}},
            ["/scheduler", "/scheduler/type", "/scheduler/params"],
        ),
        ({"fp16": None}, ["/fp16"]),
    ],
)
def test_walk_invalid_config_is_accepted(value, expected):
    assert walk_pointers(value) == expected


def test_walk_does_not_fill_in_a_key_given_under_its_deprecated_name():
    filled = walk_pointers(
        {"bfloat16": {"enabled": True}}, fill=partial(get_default, backend="torch")
    )
    assert "/bfloat16/enabled" in filled
    assert "/bf16" not in filled


@pytest.mark.parametrize(
    ("schema", "backend", "default"),
    [
        ({"default": 1}, "torch", 1),
        ({"default": None}, "torch", None),
        ({"default": 1, "x-backend": "deepspeed"}, "torch", ABSENT),
        ({"default": 1, "x-backend": "deepspeed"}, "deepspeed", 1),
        ({"default": 1, "deprecated": True}, "deepspeed", ABSENT),
        ({"default": 1, "x-alias-of": "other"}, "deepspeed", ABSENT),
        ({"type": "integer"}, "torch", ABSENT),
        ({"properties": {}}, "torch", SECTION),
        ({"properties": {}, "required": ["type"]}, "torch", ABSENT),
        ({"properties": {}, "default": None}, "torch", None),
    ],
)
def test_default_of_absent_key_depends_on_schema_and_backend(schema, backend, default):
    assert get_default(schema, backend) is default


def flatten(value, pointer=""):
    """Yield the values of nested dicts by JSON pointer."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from flatten(below, join_pointer(pointer, key))
    else:
        yield pointer, value


def valid_configs():
    """Yield each valid config of the corpus, resolved, with the context of its rules."""
    for entry in INDEX:
        problems, context = examine(load_document(path_of(entry)), 1, reject_auto=True)
        if not any(problem.severity == "error" for problem in problems):
            yield load_config(path_of(entry)), context


def test_resolved_printed_and_deepspeed_values_agree():
    """Compare the values that a run uses, `onecycle config` prints, and DeepSpeed receives."""
    compared = 0
    for config, context in valid_configs():
        printed = {entry.pointer: entry.value for entry in trace_origins(context)}
        used = {
            "/gradient_clipping": config.gradient_clipping,
            "/engine/progress_bar": config.progress.has_bar,
            "/engine/seed": config.data.seed,
            "/train_batch_size": config.batch.train,
        }
        if "steps_per_print" in config.raw:
            used["/steps_per_print"] = config.progress.every
        if config.optimizer is not None:
            params = config.optimizer.params.items()
            used |= {join_pointer("/optimizer/params", key): value for key, value in params}
        if config.backend.name == "deepspeed":
            received = build_deepspeed_config(config, builds_optimizer=True)
            received.pop("optimizer", None)
            # The engine sets this key itself if DeepSpeed does not build the optimizer.
            received.pop("zero_force_ds_cpu_optimizer", None)
            used |= dict(flatten(received))
        for pointer, value in used.items():
            if means_default(pointer, printed.get(pointer)):
                assert value != "auto", (config.name, pointer)
            elif pointer in printed:
                assert printed[pointer] == value, (config.name, pointer)
                compared += 1
            else:  # inside a value that is printed as a whole
                assert is_within(pointer, printed) or value == {}, (config.name, pointer)
    assert compared > 3000

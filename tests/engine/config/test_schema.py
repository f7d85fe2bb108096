"""The walk over the config schema, and the one rule for defaults."""

from functools import partial

import pytest

import schemas
from engine.backends.deepspeed_config import deepspeed_config
from engine.config import load_config, load_document
from engine.config.pointers import is_within, pointer_to
from engine.config.provenance import trace_origins
from engine.config.schema import ABSENT, SCHEMA, SECTION, default_of, walk
from engine.config.validate import examine
from tests.testing.corpus import INDEX, path_of


def pointers(value, **how):
    return [member.pointer for member in walk(value, schemas.read(SCHEMA), **how)]


def test_walk_yields_the_given_keys_in_their_order_without_parked_ones():
    config = {"fp16": {"x-note": 1, "enabled": True}, "//": 2, "train_batch_size": 8}
    assert pointers(config) == ["/fp16", "/fp16/enabled", "/train_batch_size"]


def test_walk_resolves_params_by_the_type_of_their_block():
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
def test_walk_accepts_an_invalid_config(value, expected):
    assert pointers(value) == expected


def test_walk_does_not_fill_in_a_key_that_is_given_under_its_old_name():
    filled = pointers({"bfloat16": {"enabled": True}}, fill=partial(default_of, backend="torch"))
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
def test_default_of_an_absent_key_follows_from_its_schema(schema, backend, default):
    assert default_of(schema, backend) is default


def leaves(value, pointer=""):
    """Yield the values of nested dicts by JSON pointer."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from leaves(below, pointer_to(pointer, key))
    else:
        yield pointer, value


def runnable():
    """Yield each config of the corpus that can run as it is, and what was examined of it."""
    for entry in INDEX:
        problems, context = examine(load_document(path_of(entry)), 1, runs=True)
        if not any(problem.severity == "error" for problem in problems):
            yield load_config(path_of(entry)), context


def test_resolved_config_origins_and_deepspeed_config_agree_on_every_value():
    """What a run uses, what `onecycle config` prints, and what DeepSpeed receives."""
    compared = 0
    for config, context in runnable():
        printed = {entry.pointer: entry.value for entry in trace_origins(context)}
        used = {
            "/gradient_clipping": config.gradient_clipping,
            "/steps_per_print": config.steps_per_print,
            "/engine/seed": config.data.seed,
            "/train_batch_size": config.batch.train,
        }
        if config.optimizer is not None:
            params = config.optimizer.params.items()
            used |= {pointer_to("/optimizer/params", key): value for key, value in params}
        if config.backend.name == "deepspeed":
            received = deepspeed_config(config, builds_optimizer=True)
            received.pop("optimizer", None)
            # DeepSpeed is told so where the optimizer is ours, whatever the config says.
            received.pop("zero_force_ds_cpu_optimizer", None)
            used |= dict(leaves(received))
        for pointer, value in used.items():
            if pointer in printed:
                assert printed[pointer] == value, (config.name, pointer)
                compared += 1
            else:  # inside a value that is printed as a whole
                assert is_within(pointer, printed) or value == {}, (config.name, pointer)
    assert compared > 3000

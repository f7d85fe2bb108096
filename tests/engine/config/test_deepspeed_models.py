"""Test that the section schemas have the keys and defaults of the installed DeepSpeed."""

import importlib
import warnings

import pytest

import schemas
from engine.backends.deepspeed_config import build_deepspeed_config
from engine.config import load_config
from engine.config.schema import resolve_reference

MODELS = {
    ("fp16",): "runtime.precision_config:DeepSpeedFP16Config",
    ("bf16",): "runtime.precision_config:DeepSpeedBF16Config",
    ("zero_optimization",): "runtime.zero.config:DeepSpeedZeroConfig",
    ("zero_optimization", "offload_param"): (
        "runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig"
    ),
    ("zero_optimization", "offload_optimizer"): (
        "runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig"
    ),
    ("zero_optimization", "zenflow"): "runtime.zenflow.zenflow_config:ZenFlowConfig",
    ("zero_optimization", "leaf_module"): (
        "runtime.zero.leaf_module_config:DeepSpeedZeroLeafModuleConfig"
    ),
    ("hybrid_engine",): "runtime.config:HybridEngineConfig",
    ("tensorboard",): "monitor.config:TensorBoardConfig",
    ("wandb",): "monitor.config:WandbConfig",
    ("csv_monitor",): "monitor.config:CSVConfig",
    ("comet",): "monitor.config:CometConfig",
    ("comms_logger",): "comm.config:CommsLoggerConfig",
    ("compile",): "compile.config:CompileConfig",
    ("tensor_parallel",): "runtime.tensor_parallel.config:TPTrainingConfig",
}
# Keys whose values JSON cannot represent, or that only DeepSpeed's config model reads.
NOT_IN_JSON = {"mpu", "tp_group", "dtype", "injection_policy_tuple"}
NO_DEFAULT = {  # our default is described in text or computed
    "classes",
    "model_persistence_threshold",
    "stage3_model_persistence_threshold",
    "leaf_module",
}
OWN_DEFAULT = {  # names of this library's runs
    ("tensorboard", "job_name"),
    ("csv_monitor", "job_name"),
    ("wandb", "project"),
}


def model_of(path):
    module, _, name = path.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"deepspeed.{module}"), name)


def schema_of(path):
    schema = schemas.read("ds_config.schema.json")
    for key in path:
        schema = resolve_reference(schema["properties"][key])
    return schema


@pytest.mark.parametrize(("path", "model"), MODELS.items(), ids=map("/".join, MODELS))
def test_section_schema_matches_the_deepspeed_model(path, model):
    properties = {
        key: schema
        for key, schema in schema_of(path)["properties"].items()
        if "x-removed" not in schema
    }
    fields = model_of(model).model_fields
    accepted = {
        name: field
        for key, field in fields.items()
        for name in {key, field.alias or key}
        if key not in NOT_IN_JSON
    }
    difference = {
        "only in DeepSpeed": sorted(accepted.keys() - properties.keys() - NOT_IN_JSON),
        "only in our schema": sorted(properties.keys() - accepted.keys() - NOT_IN_JSON),
        "defaults": {
            key: (ours["default"], theirs)
            for key, ours in properties.items()
            if key in accepted
            and key not in NO_DEFAULT
            and (*path, key) not in OWN_DEFAULT
            and "default" in ours
            and ours["default"] != (theirs := json_default(accepted[key]))
        },
    }
    assert difference == {"only in DeepSpeed": [], "only in our schema": [], "defaults": {}}


def json_default(field):
    """Return the default of a model's field as a JSON value."""
    default = field.get_default(call_default_factory=True)
    if hasattr(default, "value"):
        default = default.value
    return default


def test_removed_keys_are_those_that_deepspeed_rejects():
    config = model_of("runtime.config:DeepSpeedConfig")
    module = importlib.import_module(config.__module__)
    for path, removed in (
        ((), module._REMOVED_TOP_LEVEL_CONFIG_KEYS),
        (("zero_optimization",), module._REMOVED_ZERO_CONFIG_KEYS),
    ):
        properties = schema_of(path)["properties"]
        assert {key for key, of in properties.items() if "x-removed" in of} == set(removed)


OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}
ZERO = schema_of(("zero_optimization",))["properties"]


@pytest.mark.parametrize(
    "key", [key for key, of in ZERO.items() if "default" in of and "x-removed" not in of]
)
def test_deepspeed_accepts_the_complete_zero_section(key):
    """If a key has several names, the defaults of the others must not contradict the one given."""
    zero = {"stage": 3, key: ZERO[key]["default"]}
    config = load_config({"train_batch_size": 8, "zero_optimization": zero, **OPTIMIZER})
    settings = build_deepspeed_config(config, builds_optimizer=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_of(MODELS["zero_optimization",])(**settings["zero_optimization"])
    assert model.stage == zero["stage"]

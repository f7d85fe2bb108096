"""Train a PyTorch model from one JSON config, in the dialect of DeepSpeed's ``ds_config.json``.

``initialize`` proves the config right and returns an engine that is called like the model. Names
are loaded when they are first used: reading and validating configs needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.backends.deepspeed_schedules import register_with_deepspeed
    from engine.config import (
        Config,
        ConfigError,
        Problem,
        load_config,
        validate,
    )
    from engine.config.overrides import add_config_arguments
    from engine.engine import Engine
    from engine.initialization import initialize
    from engine.range_test.api import lr_range_test

__all__ = [
    "Config",
    "ConfigError",
    "Engine",
    "Problem",
    "add_config_arguments",
    "initialize",
    "load_config",
    "lr_range_test",
    "register_with_deepspeed",
    "validate",
]

_HOMES = {
    "Config": "engine.config",
    "ConfigError": "engine.config",
    "Engine": "engine.engine",
    "Problem": "engine.config",
    "add_config_arguments": "engine.config.overrides",
    "initialize": "engine.initialization",
    "load_config": "engine.config",
    "lr_range_test": "engine.range_test.api",
    "register_with_deepspeed": "engine.backends.deepspeed_schedules",
    "validate": "engine.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

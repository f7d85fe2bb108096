# Generated from the package's `__all__` by `make generate`.

from engine.backends.deepspeed_schedules import register_with_deepspeed
from engine.config.overrides import add_config_arguments
from engine.config.overrides import add_schedule_arguments
from engine.config.resolve import Config
from engine.config.resolve import load_config
from engine.config.validate import validate
from engine.engine import Engine
from engine.errors import CheckpointError
from engine.errors import ConfigError
from engine.errors import MisuseError
from engine.errors import Problem
from engine.initialization import initialize
from engine.range_test.api import lr_range_test
from engine.range_test.report import LRRangeReport

__version__: str

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "Engine",
    "LRRangeReport",
    "MisuseError",
    "Problem",
    "__version__",
    "add_config_arguments",
    "add_schedule_arguments",
    "initialize",
    "load_config",
    "lr_range_test",
    "register_with_deepspeed",
    "validate",
]

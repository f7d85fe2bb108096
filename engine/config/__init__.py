"""Read, validate and resolve configs. This package does not import torch."""

from engine.config.resolve import CheckpointPlan, Config, LossScaling, load_config
from engine.config.source import Source, load_document
from engine.config.validate import validate
from engine.errors import ConfigError, Problem

__all__ = [
    "CheckpointPlan",
    "Config",
    "ConfigError",
    "LossScaling",
    "Problem",
    "Source",
    "load_config",
    "load_document",
    "validate",
]

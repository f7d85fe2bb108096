"""Configs: read with their places, proved right all at once, resolved. Nothing here needs torch."""

from engine.config.resolve import Config, LossScaling, Source, load_config, load_document, validate
from engine.errors import ConfigError, Problem

__all__ = [
    "Config",
    "ConfigError",
    "LossScaling",
    "Problem",
    "Source",
    "load_config",
    "load_document",
    "validate",
]

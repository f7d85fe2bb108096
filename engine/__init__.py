"""Train a PyTorch model from one JSON config in the format of DeepSpeed's ``ds_config.json``.

`initialize` validates the config and returns a training engine. Call the engine wherever you would
call the model. Public names are imported lazily, so that loading and validating a config does not
import torch.
"""

from __future__ import annotations

import importlib.util
from typing import Any

_MODULES = {
    "CheckpointError": "engine.errors",
    "Config": "engine.config",
    "ConfigError": "engine.errors",
    "Engine": "engine.engine",
    "LRRangeReport": "engine.range_test.report",
    "MisuseError": "engine.errors",
    "Problem": "engine.errors",
    "add_config_arguments": "engine.config.overrides",
    "add_schedule_arguments": "engine.config.overrides",
    "initialize": "engine.initialization",
    "load_config": "engine.config",
    "lr_range_test": "engine.range_test.api",
    "register_with_deepspeed": "engine.backends.deepspeed_schedules",
    "validate": "engine.config",
}

# Names of DeepSpeed for `import engine as deepspeed`. `dir` does not list them.
_DEEPSPEED_NAMES = frozenset(
    """
    DeepSpeedConfig DeepSpeedDataLoader DeepSpeedInferenceConfig DeepSpeedOptimizer
    DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable DeepSpeedTransformerConfig
    DeepSpeedTransformerLayer DualPipeVModule HAS_TRITON InferenceEngine OnDevice PipelineModule
    __git_branch__ __git_hash__ __version_major__ __version_minor__ __version_patch__ accelerator
    autotuning checkpointing comm compile constants default_inference_config dist get_accelerator
    inference init_distributed init_inference io linear log_dist logger model_implementations
    module_inject moe monitor ops pipe profiling replace_transformer_layer runtime set_autotp_mode
    tp_model_init utils version zero
    """.split()  # noqa: SIM905  # readable at a glance, unlike a column of strings
)

# Names of DeepSpeed's classes with a counterpart: what `initialize` returns and raises.
_CLASSES = {
    "DeepSpeedConfigError": ("engine.errors", "ConfigError"),
    "DeepSpeedEngine": ("engine.engine", "Engine"),
    "DeepSpeedHybridEngine": ("engine.backends.deepspeed_names", "DeepSpeedHybridEngine"),
    "DualPipeVEngine": ("engine.backends.deepspeed_names", "DualPipeVEngine"),
    "PipelineEngine": ("engine.backends.deepspeed_names", "PipelineEngine"),
}

__all__ = sorted([*_MODULES, "__version__"])  # noqa: PLE0605  # computed, so that each name is listed once


def _check_packages() -> None:
    """Check that no other module shadows onecycle's packages ``schedules`` and ``schemas``.

    `onecycle.packages` performs the same check for the package ``engine``.

    Raises:
        ImportError: another module shadows one of the packages.
    """
    for name in ("schedules", "schemas"):
        spec = importlib.util.find_spec(name)
        found = spec and [*(spec.submodule_search_locations or ()), spec.origin][0]
        if found != __path__[0].removesuffix("engine") + name:
            raise ImportError(
                f"Python imports {found} instead of onecycle's package `{name}`. Rename this file "
                f"or directory, for example to `my_{name}`."
            )


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("onecycle")
    if name in _MODULES or name in _CLASSES:
        module, name = _CLASSES.get(name) or (_MODULES[name], name)
        return getattr(importlib.import_module(module), name)
    if name in _DEEPSPEED_NAMES:
        return _import_from_deepspeed(name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")


def _import_from_deepspeed(name: str) -> Any:
    try:
        from engine.backends.deepspeed_import import import_deepspeed

        return getattr(import_deepspeed(), name)
    except ImportError as error:
        raise ImportError(
            f"`{name}` requires DeepSpeed, but importing DeepSpeed failed: {error}. Run `pip "
            "install deepspeed`."
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_check_packages()

"""Look up a run's settings by the names that DeepSpeed's engine uses.

Scripts written for DeepSpeed read settings from its engine, for example with
``engine.zero_optimization_stage()``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import schemas
from engine.backends.base import Backend
from engine.config import Config
from engine.config.schema import SCHEMA, get_default, walk

__all__ = ["find_attribute", "find_setting"]

_ZERO = "/zero_optimization"

_KEYS: Mapping[str, tuple[str, Any]] = {
    "dataloader_drop_last": ("/dataloader_drop_last", False),
    "dump_state": ("/dump_state", False),
    "flops_profiler_detailed": ("/flops_profiler/detailed", True),
    "flops_profiler_enabled": ("/flops_profiler/enabled", False),
    "flops_profiler_module_depth": ("/flops_profiler/module_depth", -1),
    "flops_profiler_output_file": ("/flops_profiler/output_file", None),
    "flops_profiler_profile_step": ("/flops_profiler/profile_step", 1),
    "flops_profiler_top_modules": ("/flops_profiler/top_modules", 1),
    "gradient_predivide_factor": ("/gradient_predivide_factor", 1.0),
    "loss_scale": ("/fp16/loss_scale", 0),
    "memory_breakdown": ("/memory_breakdown", False),
    "sparse_gradients_enabled": ("/sparse_gradients", False),
    "torch_autocast_enabled": ("/torch_autocast/enabled", False),
    "zero_allow_untested_optimizer": ("/zero_allow_untested_optimizer", False),
}
"""Maps the name of a DeepSpeed engine method to the JSON pointer and default of the config key
that the method reads."""

_SETTINGS: Mapping[str, Callable[[Config], Any]] = {
    "dynamic_loss_scale": lambda config: _read(config, "/fp16/loss_scale", 0) == 0,
    "initial_dynamic_scale": lambda config: 2 ** _read(config, "/fp16/initial_scale_power", 16),
    "optimizer_params": lambda config: dict(config.optimizer.params) if config.optimizer else None,
    "postscale_gradients": lambda config: not _read(config, "/prescale_gradients", default=False),
    "scheduler_params": lambda config: config.schedule.params() if config.schedule else None,
    "zero_gather_16bit_weights_on_model_save": lambda config: (
        config.backend.name == "torch"
        or _read(config, f"{_ZERO}/stage3_gather_16bit_weights_on_model_save", default=False)
    ),
    "zero_optimization_partition_gradients": lambda config: config.zero_stage >= 2,
    "zero_optimization_partition_weights": lambda config: config.zero_stage == 3,
}
"""Maps the name of a DeepSpeed engine method to a function that computes the method's result from
the config."""

_WITHOUT_PARALLELISM = {
    "has_moe_layers": False,
    "mp_world_size": 1,
    "pipeline_parallelism": False,
    "seq_dp_world_size": None,
    "sequence_parallel_size": 1,
}
"""Attributes of DeepSpeed's engine, with their values in runs that use only data parallelism."""

_ONLY_DEEPSPEED = frozenset(
    """
    aio_config all_to_all_group allreduce_bucket autotp_size buffered_allreduce_fallback
    checkpoint_engine clip_fp32_gradients coalesce_grad_reduction communication_data_type
    curriculum_learning_enabled data_efficiency_enabled eigenvalue engine_timers
    expert_data_parallel_group expert_parallel_group flops_profiler
    get_data_types get_model_parallel_rank get_sequence_parallel_group get_tensor_parallel_rank
    get_wall_clock_timers is_compiled moe_layers mpu num_experts offload_states quantizer
    random_ltd_enabled random_ltd_scheduler register_compile_pass reload_states
    seq_data_parallel_group seq_parallel_group set_custom_curriculum_learning_schedule
    set_data_post_process_func timers tput_timer zero_contiguous_gradients zero_cpu_offload
    zero_offload_optimizer zero_offload_param zero_overlap_comm zero_reduce_bucket_size
    zero_reduce_scatter zero_use_cpu_optimizer
    """.split()  # noqa: SIM905  # readable at a glance, unlike a column of strings
)
"""Attributes of DeepSpeed's engine that the PyTorch backend does not support."""


def find_attribute(backend: Backend, config: Config, name: str) -> Any:
    """Return the setting with a given DeepSpeed name, or an attribute of the backend or the model.

    The engine calls this function for names that neither the engine nor ``nn.Module`` defines.

    Raises:
        AttributeError: this run does not have the attribute. If DeepSpeed's engine has it, the
            message states how to select the DeepSpeed backend.
    """
    with contextlib.suppress(KeyError):
        return find_setting(config, name)
    try:
        return backend.get_attribute(name)
    except AttributeError as error:
        if name in _ONLY_DEEPSPEED:
            raise AttributeError(
                f"`{name}` exists only with the DeepSpeed backend, but this run uses the torch "
                'backend. Set "engine": {"backend": "deepspeed"} in the config.'
            ) from None
        raise AttributeError(
            f"Neither the training engine nor the model ({type(backend.model).__name__}) "
            f"has the attribute `{name}`."
        ) from error


def find_setting(config: Config, name: str) -> Any:
    """Return the config setting that DeepSpeed's engine provides under a given name.

    If DeepSpeed provides it as a method, return a function that takes no arguments and returns the
    setting.

    Raises:
        KeyError: no setting has this name.

    >>> from engine.config import load_config
    >>> find_setting(load_config({"train_batch_size": 8}), "loss_scale")()
    0
    """
    if name in _KEYS:
        return partial(_read, config, *_KEYS[name])
    if name in _SETTINGS:
        return partial(_SETTINGS[name], config)
    if config.backend.name == "deepspeed":
        raise KeyError(name)
    return _WITHOUT_PARALLELISM[name]


def _read(config: Config, pointer: str, default: Any) -> Any:
    """Return the value of a config key, or DeepSpeed's default if the key is not set."""
    members = walk(config.raw, schemas.read(SCHEMA), fill=partial(get_default, backend="deepspeed"))
    return next((each.value for each in members if each.pointer == pointer), default)

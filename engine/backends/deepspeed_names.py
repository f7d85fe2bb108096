"""Look up a run's settings by the names that DeepSpeed's engine uses.

Scripts written for DeepSpeed read settings from its engine, for example with
``engine.zero_optimization_stage()``, and check the engine's class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import schemas
from engine.backends.base import Backend
from engine.backends.whole_weights import collect_weights, convert_parameters
from engine.config import Config
from engine.config.schema import SCHEMA, get_default, means_default, walk
from engine.errors import MisuseError

__all__ = [
    "DeepSpeedHybridEngine",
    "DualPipeVEngine",
    "PipelineEngine",
    "check_is_no_pipeline",
    "check_load_function",
    "compile_model",
    "find_attribute",
    "find_setting",
    "gather_on_rank_0",
    "is_pipeline",
    "read_optimizer_name",
]

_ZERO = "/zero_optimization"

_KEYS: Mapping[str, tuple[str, Any]] = {
    "dataloader_drop_last": ("/dataloader_drop_last", False),
    "dump_state": ("/dump_state", False),
    "flops_profiler_detailed": ("/flops_profiler/detailed", True),
    "flops_profiler_enabled": ("/flops_profiler/enabled", False),
    "flops_profiler_module_depth": ("/flops_profiler/module_depth", -1),
    "flops_profiler_output_file": ("/flops_profiler/output_file", None),
    "flops_profiler_profile_step": ("/flops_profiler/profile_step", 1),
    "flops_profiler_recompute_fwd_factor": ("/flops_profiler/recompute_fwd_factor", 0.0),
    "flops_profiler_top_modules": ("/flops_profiler/top_modules", 1),
    "gradient_predivide_factor": ("/gradient_predivide_factor", 1.0),
    "log_level": ("/log_level", None),
    "loss_scale": ("/fp16/loss_scale", 0),
    "managed_gradient_accumulation": ("/managed_gradient_accumulation", True),
    "memory_breakdown": ("/memory_breakdown", False),
    "sparse_gradients_enabled": ("/sparse_gradients", False),
    "torch_autocast_enabled": ("/torch_autocast/enabled", False),
    "wall_clock_breakdown": ("/wall_clock_breakdown", False),
    "zero_allow_untested_optimizer": ("/zero_allow_untested_optimizer", False),
}
"""Maps the name of a DeepSpeed engine method to the JSON pointer and default of the config key
that the method reads."""

_SETTINGS: Mapping[str, Callable[[Config], Any]] = {
    "bfloat16_enabled": lambda config: config.precision == "bf16",
    "dynamic_loss_scale": lambda config: _read(config, "/fp16/loss_scale", 0) == 0,
    "fp16_enabled": lambda config: config.precision == "fp16",
    "initial_dynamic_scale": lambda config: 2 ** _read(config, "/fp16/initial_scale_power", 16),
    "optimizer_params": lambda config: dict(config.optimizer.params) if config.optimizer else None,
    "postscale_gradients": lambda config: not _read(config, "/prescale_gradients", default=False),
    "scheduler_name": lambda config: config.schedule.type_name if config.schedule else None,
    "scheduler_params": lambda config: config.schedule.params() if config.schedule else None,
    "zero_gather_16bit_weights_on_model_save": lambda config: (
        config.backend.name == "torch"
        or _read(config, f"{_ZERO}/stage3_gather_16bit_weights_on_model_save", default=False)
    ),
    "zero_optimization": lambda config: config.zero_stage > 0,
    "zero_optimization_partition_gradients": lambda config: config.zero_stage >= 2,
    "zero_optimization_partition_weights": lambda config: config.zero_stage == 3,
    "zero_optimization_stage": lambda config: config.zero_stage,
}
"""Maps the name of a DeepSpeed engine method to a function that computes the method's result from
the config."""

_PYTORCH_KEYS: Mapping[str, str] = {
    "bf16_master_weights_and_gradients": "/bf16/bf16_master_weights_and_grads",
    "bf16_optimizer_states": "/bf16/bf16_optimizer_states",
    "fp16_auto_cast": "/fp16/auto_cast",
    "fp16_master_weights_and_gradients": "/fp16/fp16_master_weights_and_grads",
    "is_sanity_checks_enabled": f"{_ZERO}/enable_sanity_checks",
    "load_universal_checkpoint": "/checkpoint/load_universal",
    "optimizer_legacy_fusion": "/optimizer/legacy_fusion",
    "use_node_local_storage": "/checkpoint/use_node_local_storage",
    "zero_force_ds_cpu_optimizer": "/zero_force_ds_cpu_optimizer",
    "zero_multi_rank_bucket_allreduce": f"{_ZERO}/use_multi_rank_bucket_allreduce",
} | {
    f"zero_{name}": f"{_ZERO}/{prefix}{name}"
    for prefix, names in {
        "": """
            allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients
            elastic_checkpoint ignore_unused_parameters legacy_stage1 load_from_fp32_weights
            log_trace_cache_warnings parameter_alignment reduce_bucket_size reduce_scatter
            round_robin_gradients save_muon_momentum_buffer_in_memory sub_group_size
            """,
        "stage3_": """
            allgather_sequential max_live_parameters max_reuse_distance
            model_persistence_threshold module_granularity_threshold
            param_persistence_threshold prefetch_bucket_size
            """,
        "zero_": """
            hpz_partition_size quantized_gradients quantized_nontrainable_weights
            quantized_weights
            """,
    }.items()
    for name in names.split()
}
"""Maps the names of DeepSpeed engine methods to the JSON pointers of the config keys that the
methods read. On the DeepSpeed backend, DeepSpeed's own methods are called."""

_PYTORCH_SETTINGS: Mapping[str, Callable[[Config], Any]] = {
    "autotp_size": lambda config: 0,
    "autotuning_enabled": lambda config: _read(config, "/autotuning/enabled", default=False),
    "checkpoint_tag_validation_enabled": lambda config: _read_tag_validation(config) != "ignore",
    "checkpoint_tag_validation_fail": lambda config: _read_tag_validation(config) == "fail",
    "curriculum_learning_enabled": lambda config: False,
    "data_efficiency_enabled": lambda config: False,
    "data_sampling_enabled": lambda config: False,
    "empty_partition_cache": lambda config: None,
    "is_deepcompile_active": lambda config: False,
    "is_deepcompile_enabled": lambda config: False,
    "is_first_weights_partition_group": lambda config: config.zero_stage == 3,
    "random_ltd_enabled": lambda config: False,
    "zero_nvme_offload_optimizer": lambda config: False,
    "zero_overlap_comm": lambda config: (
        config.zero_stage == 3
        if (overlaps := _read(config, f"{_ZERO}/overlap_comm", None)) is None
        else overlaps
    ),
}
"""Like `_SETTINGS`, but only for the PyTorch backend, which lacks most of these features."""

_PYTORCH_VALUES = {
    "enable_backward_allreduce": True,
    "gradient_average": True,
    "has_moe_layers": False,
    "mp_world_size": 1,
    "pipeline_parallelism": False,
    "seq_dp_world_size": None,
    "sequence_parallel_size": 1,
}
"""Attributes of DeepSpeed's engine, with their values in runs on the PyTorch backend, which use
only data parallelism."""

_PYTORCH_ATTRIBUTES: Mapping[str, Callable[[Backend], Any]] = {
    "get_data_parallel_rank": lambda backend: lambda: backend.ranks.rank,
    "is_compiled": lambda backend: backend.model._compiled_call_impl is not None,  # noqa: SLF001  # private in torch
    "param_names": lambda backend: {p: name for name, p in backend.model.named_parameters()},
}
"""Maps names of attributes of DeepSpeed's engine to functions that compute them from the PyTorch
backend."""

_ONLY_DEEPSPEED = frozenset(
    """
    aio_config all_gather_scalar all_to_all_group allreduce_and_copy allreduce_bucket
    allreduce_no_retain autotuning_end_profile_step autotuning_metric autotuning_metric_path
    autotuning_model_info autotuning_model_info_path autotuning_profile_model_info
    autotuning_start_profile_step buffered_allreduce_fallback checkpoint_engine checkpoint_mp_rank
    checkpoint_serialization_enabled checkpoint_writer_enabled client_lr_scheduler client_optimizer
    clip_fp32_gradients coalesce_grad_reduction collate_fn collect_python_gc communication_data_type
    compile_autosp compile_autotp compile_zero_optimization_stage cpuadam_cores_perc
    curriculum_learning_config data_efficiency_config data_sampling_config dist_backend
    dont_change_device dynamic_loss_scale_args engine_timers engine_timers_cache
    expert_data_parallel_group expert_parallel_group first_dataloader_check flatten flops
    flops_profiler fwd_duration gate_modules get_autosp_backend get_autotp_backend get_compile_time
    get_data_types get_deepcompile_backend get_deepspeed_compile_backend get_model_parallel_rank
    get_optimizer_configuration get_sequence_parallel_group get_tensor_parallel_rank
    get_wall_clock_timers is_iterable_style_dataset is_map_style_dataset load_moe_state_dict
    loaded_checkpoint_dp_world_size loaded_checkpoint_mp_world_size local_all_to_all_group losses
    mesh_device module_forward_post_hook module_forward_pre_hook moe_layers mpu num_experts
    offload_states optimized_linear_base_weight_sharding optimized_linear_lora_enabled
    print_forward_breakdown random_ltd_config random_ltd_initialize random_ltd_scheduler
    register_compile_pass reload_states save_non_zero_checkpoint save_zero_checkpoint scale_wrt_gas
    seq_data_parallel_group seq_parallel_group set_custom_curriculum_learning_schedule
    set_data_post_process_func sparse_all_gather sparse_allreduce sparse_allreduce_bucket
    sparse_allreduce_no_retain summary_events super_offload swap_tensor_config
    tensor_parallel_config timers torch_autocast_dtype torch_autocast_lower_precision_safe_modules
    torch_autocast_z0_gradscaler tput_timer training_data unflatten update_interval use_ds_comm
    uses_parallelization_pass_only warn_unscaled_loss zenflow_config zero_cpu_offload
    zero_offload_optimizer zero_offload_param zero_partial_offload zero_use_cpu_optimizer
    """.split()  # noqa: SIM905  # readable at a glance, unlike a column of strings
)
"""Attributes of DeepSpeed's engine that the PyTorch backend does not support."""

_LOWERCASED = frozenset("adagrad adam adamw lamb lion muadam muadamw muon musgd".split())  # noqa: SIM905
"""The optimizers whose names DeepSpeed converts to lowercase, as in its `DEEPSPEED_OPTIMIZERS`."""


class _EngineClass(type):
    """Metaclass of stand-ins for subclasses of DeepSpeed's engine.

    An engine is an instance of a stand-in if it runs DeepSpeed's engine of the same name. The check
    does not import DeepSpeed.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        backend = getattr(instance, "__dict__", {}).get("_backend")
        classes = type(getattr(backend, "engine", None)).__mro__
        return any(each.__name__ == cls.__name__ for each in classes)

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        raise TypeError(
            f"`{cls.__name__}` must not be called directly. Call `initialize`, which returns such "
            "an engine if the model or the config requires it."
        )


class PipelineEngine(metaclass=_EngineClass):
    """Class whose instances are the engines that train a ``PipelineModule``."""


class DualPipeVEngine(metaclass=_EngineClass):
    """Class whose instances are the engines that train a ``DualPipeVModule``."""


class DeepSpeedHybridEngine(metaclass=_EngineClass):
    """Class whose instances are the engines that ``hybrid_engine`` in the config enables."""


def find_attribute(backend: Backend, config: Config, name: str) -> Any:
    """Return the setting with a given DeepSpeed name, or an attribute of the backend or the model.

    The engine calls this function for names that neither the engine nor ``nn.Module`` defines.

    Raises:
        AttributeError: this run does not have the attribute. If DeepSpeed's engine has it, the
            message states how to select the DeepSpeed backend.
    """
    with contextlib.suppress(KeyError):
        return find_setting(config, name)
    is_deepspeed = config.backend.name == "deepspeed"
    if name in _PYTORCH_ATTRIBUTES and not is_deepspeed:
        return _PYTORCH_ATTRIBUTES[name](backend)
    try:
        return backend.get_attribute(name)
    except AttributeError as error:
        if name in _ONLY_DEEPSPEED and is_deepspeed:
            raise AttributeError(
                f"DeepSpeed's engine does not have the attribute `{name}` in this run. Enable the "
                "feature that uses it in the config."
            ) from error
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
    if name in _PYTORCH_KEYS:
        return partial(_read, config, _PYTORCH_KEYS[name], default=False)
    if name in _PYTORCH_SETTINGS:
        return partial(_PYTORCH_SETTINGS[name], config)
    return _PYTORCH_VALUES[name]


def _read(config: Config, pointer: str, default: Any) -> Any:
    """Return the value of a config key, or DeepSpeed's default if the key is not set."""
    fill = partial(get_default, backend="deepspeed")
    for each in walk(config.raw, schemas.read(SCHEMA), fill=fill):
        if each.pointer == pointer:
            default_of_key = fill(each.schema)
            return default_of_key if means_default(pointer, each.value) else each.value
    return default


def _read_tag_validation(config: Config) -> str:
    return str(_read(config, "/checkpoint/tag_validation", "Warn")).lower()


def read_optimizer_name(config: Config) -> str:
    """Return the type of the config's optimizer, spelled as DeepSpeed's engine returns it.

    >>> from engine.config import load_config
    >>> [read_optimizer_name(load_config({"train_batch_size": 8, "optimizer": {"type": name}}))
    ...     for name in ("AdamW", "RMSprop")]
    ['adamw', 'RMSprop']
    """
    name: str = config.raw["optimizer"]["type"]
    return name.lower() if name.lower() in _LOWERCASED else name


def is_pipeline(backend: Backend) -> bool:
    """Return whether a backend trains a ``PipelineModule``."""
    return getattr(getattr(backend, "engine", None), "pipeline_parallelism", False)


def check_is_no_pipeline(
    backend: Backend, method: str, instead: str = "train_batch` or `eval_batch"
) -> None:
    """Check that the model is not a ``PipelineModule``.

    Args:
        backend: backend that trains the model.
        method: method of the engine that does not support pipelines.
        instead: method that supports them.

    Raises:
        RuntimeError: the model is a ``PipelineModule``.
    """
    if is_pipeline(backend):
        raise MisuseError(
            f"`{method}` does not support a PipelineModule, because each rank holds only the "
            f"layers of its stage. Call `{instead}` instead."
        )


def check_load_function(load_fn: Callable[..., Any] | None) -> None:
    """Check that `Engine.load_checkpoint` received no function that loads the weights.

    Raises:
        ValueError: there is a function.
    """
    if load_fn is not None:
        raise ValueError(
            "`load_checkpoint` does not support `custom_load_fn`. Export the weights with "
            "`onecycle checkpoint export`, read them with `safetensors.torch.load_file`, and pass "
            "them to `load_module_state_dict(weights, custom_load_fn=...)`."
        )


def compile_model(
    backend: Backend,
    config: Config,
    compiler: str | Callable[..., Any] | None,
    options: Mapping[str, Any] | None,
    deepspeed_options: Mapping[str, Any],
) -> None:
    """Compile the model in place; see `DeepSpeedAccessors.compile`.

    Args:
        backend: backend that trains the model.
        config: config of the run.
        compiler: name of the compiler, or a function; None for the default.
        options: further arguments of `torch.compile`.
        deepspeed_options: arguments that only DeepSpeed supports, by name.

    Raises:
        ValueError: an argument requires the DeepSpeed backend.
    """
    options = dict(options or {})
    chosen = {} if compiler is None else {"backend": compiler}
    given = {k: v for k, v in deepspeed_options.items() if v is not None and v is not False}
    if config.backend.name == "deepspeed":
        backend.get_attribute("compile")(compile_kwargs=options, **chosen, **given)
        return
    for name in given:
        raise ValueError(
            f"`{name}` requires the DeepSpeed backend, but this run uses the torch backend. "
            'Set "engine": {"backend": "deepspeed"} in the config, or omit the argument.'
        )
    if not find_attribute(backend, config, "is_compiled"):
        backend.model.compile(**{**options, **chosen})


def gather_on_rank_0(
    backend: Backend, config: Config, exclude_frozen: bool
) -> dict[str, Any] | None:
    """Gather the weights that the PyTorch backend shards at ZeRO stage 3; return None on rank > 0.

    Args:
        backend: backend that trains the model.
        config: config of the run; 16-bit precision converts the weights.
        exclude_frozen: whether to leave out parameters that do not require gradients.

    Raises:
        ValueError: the ZeRO stage is not 3.
    """
    if config.zero_stage != 3:
        raise ValueError(
            "`_zero3_consolidated_16bit_state_dict` requires ZeRO stage 3, but this run uses "
            f"stage {config.zero_stage}. Call `module_state_dict` instead."
        )
    weights = collect_weights(backend, exclude_frozen=exclude_frozen, is_on_rank_0_only=True)
    if backend.ranks.rank != 0:
        return None
    convert_parameters(backend, weights, config.precision)
    return weights

"""Estimate the memory of the model states: parameters, gradients and optimizer states.

The formulas count the tensors that PyTorch, FSDP2 and DeepSpeed 0.19 allocate. The script
``benchmarks/memory_estimate.py`` compares the estimates with the tensors of real runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from engine.memory.optimizer_states import count_state_elements
from engine.memory.parts import Device, MemoryEstimate, ParameterSize, Part
from engine.memory.settings import MemorySettings

__all__ = ["estimate_memory"]

_FLOAT32 = 4
_16_BIT = 2


def estimate_memory(model: Sequence[ParameterSize], settings: MemorySettings) -> MemoryEstimate:
    """Estimate the memory that the model states need on each rank.

    The estimate does not include activations, model buffers, temporary tensors, fixed-size
    communication buffers or fragmentation.

    Args:
        model: parameters of the model.
        settings: backend, number of ranks, ZeRO stage, precision, optimizer and offloading.

    >>> run = MemorySettings(backend="torch", world_size=1, zero_stage=0)
    >>> estimate_memory([ParameterSize((1000,))], run).peak("GPU")
    16000
    """
    if settings.backend == "deepspeed":
        parts = _list_deepspeed_parts(model, settings)
    elif settings.is_sharded:
        parts = _list_fsdp_parts(model, settings)
    else:
        parts = _list_replicated_parts(model, settings)
    return MemoryEstimate([part for part in parts if max(part[2:])])


def _constant(name: str, device: Device, size: int) -> Part:
    return Part(name, device, size, size, size)


def _get_itemsize(parameter: ParameterSize, settings: MemorySettings) -> int:
    """Return the bytes per element of a parameter on the PyTorch backend."""
    is_converted = parameter.is_trained and settings.master_weights
    return max(parameter.itemsize, _FLOAT32) if is_converted else parameter.itemsize


def _computes_in_16_bits(model: Sequence[ParameterSize], settings: MemorySettings) -> bool:
    is_converted = settings.master_weights and any(
        each.is_trained and each.itemsize == _16_BIT for each in model
    )
    return settings.precision != "fp32" or is_converted


def _list_replicated_parts(model: Sequence[ParameterSize], settings: MemorySettings) -> list[Part]:
    trained = [each for each in model if each.is_trained]
    weights = sum(each.count * _get_itemsize(each, settings) for each in model)
    gradients = sum(each.count * _get_itemsize(each, settings) for each in trained)
    buckets = sum(each.count * max(_get_itemsize(each, settings), _FLOAT32) for each in trained)
    wide = [each for each in model if _get_itemsize(each, settings) > _16_BIT]
    # Autocast keeps the 16-bit copies of the weights until the backward pass has used them.
    casts = _computes_in_16_bits(model, settings)
    copies = _16_BIT * sum(each.count for each in wide) if casts else 0
    # On the CPU, the gradients of a step are freed only after the next forward pass.
    early = gradients if settings.accumulates or settings.on_cpu else 0
    parts = [
        _constant("parameters", "GPU", weights),
        Part("16-bit copies of the parameters", "GPU", copies, 0, 0),
        Part("gradients", "GPU", early, gradients, gradients),
        _constant("buffers for averaging gradients", "GPU", _on_several(buckets, settings)),
        _constant("optimizer states", "GPU", _count_states(trained, settings, _count_whole)),
    ]
    return _move_to_cpu(parts) if settings.on_cpu else parts


def _list_fsdp_parts(model: Sequence[ParameterSize], settings: MemorySettings) -> list[Part]:
    ranks, stage = settings.world_size, settings.zero_stage
    trained = [each for each in model if each.is_trained]
    casts = _computes_in_16_bits(model, settings)

    def count_shard(parameter: ParameterSize) -> int:
        return parameter.count_shard(ranks)

    weights = sum(count_shard(each) * _get_itemsize(each, settings) for each in model)
    gradients = sum(count_shard(each) * _get_itemsize(each, settings) for each in trained)
    # Stages 1 and 2 keep all parameters gathered until the backward pass has used them. Stage 3
    # keeps only those that belong to no block.
    gathered = sum(
        each.count * (_16_BIT if casts else _get_itemsize(each, settings))
        for each in model
        if stage < 3 or not each.in_block
    )
    early = gradients if settings.accumulates or settings.on_cpu else 0
    whole = 0
    if stage == 1 and settings.accumulates:
        early = 0
        sizes = (_FLOAT32 if casts else _get_itemsize(each, settings) for each in trained)
        whole = sum(each.count * size for each, size in zip(trained, sizes, strict=True))
    states = _count_states(trained, settings, count_shard)
    offloads = "cpu" in {settings.offload_optimizer, settings.offload_param}
    device: Device = "CPU" if offloads else "GPU"
    parts = [
        _constant("parameters (sharded)", device, weights),
        Part("gathered parameters", "GPU", gathered, 0, 0),
        Part("accumulated gradients", "GPU", whole, 0, 0),
        Part("gradients (sharded)", device, early, gradients, gradients),
        _constant("optimizer states (sharded)", device, states),
    ]
    return _move_to_cpu(parts) if settings.on_cpu else parts


def _list_deepspeed_parts(model: Sequence[ParameterSize], settings: MemorySettings) -> list[Part]:
    if settings.zero_stage == 3:
        return _list_stage_3_parts(model, settings)
    if settings.zero_stage > 0 or _has_bf16_optimizer(settings):
        return _list_stage_2_parts(model, settings)
    trained = sum(each.count for each in model if each.is_trained)
    weights, is_16_bit = _count_deepspeed_weights(model, settings)
    gradients = trained * (_16_BIT if is_16_bit else _FLOAT32)
    copies = trained * _FLOAT32 if is_16_bit else 0
    states = _count_states([each for each in model if each.is_trained], settings, _count_whole)
    return [
        _constant("parameters", "GPU", weights),
        _constant("master weights", "GPU", copies),
        Part("gradients", "GPU", gradients * settings.accumulates, gradients, gradients),
        Part("float32 gradients", "GPU", 0, 0, copies),
        _constant("optimizer states", "GPU", states),
    ]


def _list_stage_2_parts(model: Sequence[ParameterSize], settings: MemorySettings) -> list[Part]:
    """Return the parts of the memory estimate for DeepSpeed's ZeRO stages 1 and 2."""
    trained = [each for each in model if each.is_trained]
    count = sum(each.count for each in trained)
    shard = math.ceil(count / settings.world_size)
    weights, is_16_bit = _count_deepspeed_weights(model, settings)
    itemsize = _16_BIT if is_16_bit else _FLOAT32
    in_float32 = is_16_bit and settings.deepspeed.accumulates_in_float32
    accumulated = _FLOAT32 if in_float32 else itemsize
    masters = _get_master_itemsize(settings)
    states = _count_states(trained, settings, _count_whole) // settings.world_size
    device = _get_device(settings.offload_optimizer)
    parts = [
        _constant("parameters", "GPU", weights),
        _constant("master weights (sharded)", device, shard * masters),
        _constant("optimizer states (sharded)", device, states),
    ]
    if device != "GPU":
        early = shard * accumulated if settings.accumulates else 0
        return [
            *parts,
            _constant("staged parameters (sharded)", "CPU", shard * itemsize),
            _constant("accumulated gradients (sharded)", "CPU", early),
            _constant("gradients of the master weights (sharded)", "CPU", shard * masters),
        ]
    if _has_bf16_optimizer(settings):
        early = count * itemsize if settings.accumulates else 0
        return [
            *parts,
            _constant("float32 gradients", "GPU", count * _FLOAT32),
            Part("gradients", "GPU", early, count * itemsize, count * itemsize),
        ]
    is_whole = settings.zero_stage == 1 and settings.accumulates
    kept = (count if is_whole else shard) * accumulated
    early = kept if settings.accumulates else 0
    return [
        *parts,
        Part("gradients" if is_whole else "gradients (sharded)", "GPU", early, kept, 0),
        Part("gradients of the master weights (sharded)", "GPU", 0, 0, shard * masters),
    ]


def _list_stage_3_parts(model: Sequence[ParameterSize], settings: MemorySettings) -> list[Part]:
    ranks, extra = settings.world_size, settings.deepspeed
    trained = [each for each in model if each.is_trained]
    shard = sum(math.ceil(each.count / ranks) for each in trained)
    weights = sum(math.ceil(each.count / ranks) for each in model)
    is_16_bit = settings.precision != "fp32"
    itemsize = _16_BIT if is_16_bit else _FLOAT32
    accumulated = _FLOAT32 if is_16_bit and extra.accumulates_in_float32 else itemsize
    small = sum(each.count for each in model if each.count <= extra.persistence_threshold)
    live = min(sum(each.count for each in model) - small, extra.max_live_parameters)
    masters = _get_master_itemsize(settings)
    states = _count_states(trained, settings, lambda each: math.ceil(each.count / ranks))
    device = _get_device(settings.offload_optimizer)
    updated = shard if device != "GPU" else min(shard, extra.sub_group_size)
    gradients = Part("gradients of the master weights (sharded)", device, 0, 0, updated * masters)
    if device == "CPU":
        gradients = _constant(gradients.name, device, gradients.step)
    return [
        _constant("parameters (sharded)", _get_device(settings.offload_param), weights * itemsize),
        _constant(
            "parameters that are not sharded", "GPU", _on_several(small, settings) * itemsize
        ),
        Part("gathered parameters", "GPU", _on_several(live, settings) * itemsize, 0, 0),
        _constant("master weights (sharded)", device, shard * masters),
        _constant("optimizer states (sharded)", device, states),
        _constant("gradients (sharded)", "GPU" if device == "GPU" else "CPU", shard * accumulated),
        gradients,
    ]


def _count_deepspeed_weights(
    model: Sequence[ParameterSize], settings: MemorySettings
) -> tuple[int, bool]:
    """Return the parameters' size in bytes, and whether DeepSpeed converts them to 16 bits."""
    is_16_bit = settings.precision != "fp32"
    return sum(each.count * (_16_BIT if is_16_bit else each.itemsize) for each in model), is_16_bit


def _has_bf16_optimizer(settings: MemorySettings) -> bool:
    """Return whether DeepSpeed uses its BF16 optimizer, which keeps unsharded float32 gradients."""
    return (
        settings.precision == "bf16"
        and settings.zero_stage == 1
        and settings.deepspeed.accumulates_in_float32
        and settings.offload_optimizer == "none"
    )


def _get_master_itemsize(settings: MemorySettings) -> int:
    is_16_bit = settings.precision != "fp32" and settings.deepspeed.has_16_bit_masters
    return _16_BIT if is_16_bit else _FLOAT32


def _get_state_itemsize(parameter: ParameterSize, settings: MemorySettings) -> int:
    if settings.backend == "torch":
        return _get_itemsize(parameter, settings)
    return _16_BIT if settings.deepspeed.has_16_bit_states else _FLOAT32


def _count_states(
    trained: Sequence[ParameterSize],
    settings: MemorySettings,
    count: Callable[[ParameterSize], int],
) -> int:
    """Return the size of the optimizer states on one rank, in bytes.

    Args:
        trained: parameters that the optimizer trains.
        settings: settings of the run.
        count: function that returns how many elements of a parameter the rank stores.
    """
    block = settings.optimizer
    has_adam = settings.backend == "deepspeed"
    total = 0
    for each in trained:
        states = count_state_elements(block.type, block.params, each.shape, has_adam=has_adam)
        part = count(each) / each.count if each.count else 0
        total += round(states * part) * _get_state_itemsize(each, settings)
    return total


def _count_whole(parameter: ParameterSize) -> int:
    return parameter.count


def _on_several(size: int, settings: MemorySettings) -> int:
    """Return ``size`` if the run has more than one rank, and 0 otherwise."""
    return size if settings.world_size > 1 else 0


def _get_device(offload: str) -> Device:
    return {"cpu": "CPU", "nvme": "NVMe"}.get(offload, "GPU")  # type: ignore[return-value]


def _move_to_cpu(parts: Sequence[Part]) -> list[Part]:
    return [part._replace(device="CPU") for part in parts]

"""Estimate the memory of a run for each ZeRO stage, with and without offloading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from engine.memory.estimate import estimate_memory
from engine.memory.parts import MemoryEstimate, ParameterSize
from engine.memory.settings import MemorySettings

__all__ = ["Alternative", "list_alternatives"]


@dataclass(frozen=True)
class Alternative:
    """Memory estimate for one ZeRO stage, with or without offloading."""

    settings: MemorySettings
    estimate: MemoryEstimate
    is_chosen: bool
    """Whether the config selects this ZeRO stage and these offload devices."""


def list_alternatives(
    model: Sequence[ParameterSize], settings: MemorySettings
) -> Iterator[Alternative]:
    """Yield a memory estimate for each ZeRO stage, with and without offloading.

    Args:
        model: parameters of the model.
        settings: settings of the run, as the config specifies them.
    """
    chosen = _normalize(settings)
    seen = set()
    for stage in range(4):
        for optimizer, parameters in (("none", "none"), ("cpu", "none"), ("cpu", "cpu")):
            other = _normalize(
                replace(
                    settings,
                    zero_stage=stage,
                    offload_optimizer=optimizer,
                    offload_param=parameters,
                )
            )
            key = (other.zero_stage, other.offload_optimizer, other.offload_param)
            if key in seen:
                continue
            seen.add(key)
            yield Alternative(other, estimate_memory(model, other), other == chosen)
    if (chosen.zero_stage, chosen.offload_optimizer, chosen.offload_param) not in seen:
        yield Alternative(chosen, estimate_memory(model, chosen), is_chosen=True)


def _normalize(settings: MemorySettings) -> MemorySettings:
    """Return the settings with the offload devices that the backend actually uses."""
    optimizer, parameters = settings.offload_optimizer, settings.offload_param
    if settings.backend == "torch":
        # FSDP2 offloads the parameters together with the optimizer states.
        is_used = settings.is_sharded and {optimizer, parameters} != {"none"}
        both = "cpu" if is_used and not settings.on_cpu else "none"
        return replace(settings, offload_optimizer=both, offload_param=both)
    if settings.zero_stage < 3:
        parameters = "none"
    if settings.zero_stage == 0:
        optimizer = "none"
    return replace(settings, offload_optimizer=optimizer, offload_param=parameters)

"""Estimate the memory that the model states of a run need on each rank."""

from __future__ import annotations

from engine.memory.estimate import estimate_memory
from engine.memory.parts import MemoryEstimate, ParameterSize, Part
from engine.memory.settings import MemorySettings, read_settings

__all__ = [
    "MemoryEstimate",
    "MemorySettings",
    "ParameterSize",
    "Part",
    "estimate_memory",
    "read_settings",
]

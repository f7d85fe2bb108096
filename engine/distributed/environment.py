"""Environment variables by which `onecycle launch` tells ranks of the launch."""

__all__ = ["ELASTIC", "TIMEOUT"]

ELASTIC = "ONECYCLE_ELASTIC"
"""Set where hosts may come and go: a run goes on with other ranks, its batch the same."""

TIMEOUT = "ONECYCLE_TIMEOUT"
"""Seconds that a collective may take."""

"""Ranks, signals, and the environment variables that the launcher sets. This module needs no torch."""

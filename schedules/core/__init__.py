"""Core of the package: curves, parameter fields, durations, and the registry of schedules."""

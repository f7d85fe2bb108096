"""Core of `schedules`: curves, parameter fields, durations, and the registry of schedules."""

"""Schedules that depend only on the step: one module per system, with that system's names."""

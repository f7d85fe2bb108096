"""Schedules without feedback: one module per system, under that system's names."""

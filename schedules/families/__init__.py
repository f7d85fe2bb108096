"""Schedules that depend only on the step, grouped by the library that they come from."""

"""Schedules that depend only on the step. Each module has the schedules of one library."""

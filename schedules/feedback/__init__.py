"""Schedules that depend on the loss or on a metric."""

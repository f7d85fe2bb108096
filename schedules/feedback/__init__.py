"""Schedules driven by the loss or a metric."""

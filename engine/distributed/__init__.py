"""Ranks, process groups, signals, environment variables and exit statuses."""

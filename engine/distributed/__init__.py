"""Ranks, signals, environment variables and exit statuses."""

"""Building blocks of schedules: curves, parameter fields, durations, and the registry."""

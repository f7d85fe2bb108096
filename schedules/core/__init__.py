"""What schedules are made of: curves, parameter fields, durations, the registry."""

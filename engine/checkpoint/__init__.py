"""Checkpoints: whole, or not there. ``envelope`` has no torch in it."""

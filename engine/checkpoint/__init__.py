"""Checkpoints: whole, or not there. ``storage`` has no torch in it."""

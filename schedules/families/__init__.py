"""Schedules without feedback: their values depend only on the training step."""

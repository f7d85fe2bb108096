"""The state of a training run, and the loops that run its steps."""

"""The state and the loops of a training run."""

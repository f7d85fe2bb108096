"""The LR range test: find a learning-rate range for a 1Cycle schedule."""

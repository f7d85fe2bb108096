"""The LR range test: find the learning rates with which a model can be trained."""

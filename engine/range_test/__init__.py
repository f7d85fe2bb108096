"""The LR range test: measure which learning rates a model can be trained with."""

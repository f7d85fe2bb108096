"""The LR range test: which learning rates a model can be trained with, measured."""

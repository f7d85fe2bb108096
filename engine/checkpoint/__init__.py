"""Save, find and load checkpoints.

The module ``storage`` does not import torch, so that commands that only list or verify checkpoints
start quickly.
"""

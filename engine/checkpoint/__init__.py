"""Save, find and load checkpoints. The module ``storage`` does not import torch."""

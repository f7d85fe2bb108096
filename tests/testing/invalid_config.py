"""A training script whose config is invalid on every rank."""

import torch

import engine

if __name__ == "__main__":
    engine.initialize(model=torch.nn.Linear(2, 1), config={"train_batch_size": -1})

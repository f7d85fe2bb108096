"""Engines that replicate a model on several ranks, and the gradients that they should average."""

import copy

import torch
import torch.distributed as dist
from torch import nn

import engine


def start(model, parameters=None, **sections):
    """Return an engine that subtracts the gradient from each parameter: SGD with lr 1.

    Args:
        model: model to train.
        parameters: parameters to train; default: all.
        sections: sections of the config; they replace those for PyTorch without ZeRO.
    """
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "engine": {"backend": "torch"},
    }
    config |= sections
    return engine.initialize(model=model, config=config, model_parameters=parameters)[0]


def draw(rank, step=0):
    """Return the inputs of a rank in a step, a tensor of shape (3, 4)."""
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def build_layers(*, has_norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(5)]
    norm = [nn.BatchNorm1d(4)] if has_norm else []
    return nn.Sequential(*layers[:2], *norm, *layers[2:])


def compute_loss(model, rank, step=0):
    return model(draw(rank, step)).pow(2).mean()


def compute_mean_gradients(model, step=0, compute_loss=compute_loss):
    """Return the mean over the ranks of each parameter's gradient, computed in this process.

    Args:
        model: model whose copies compute the gradients.
        step: number of the step, which selects the data.
        compute_loss: function of a copy, a rank and a step that returns the rank's loss.
    """
    sums = {}
    for rank in range(dist.get_world_size()):
        replica = copy.deepcopy(model)
        compute_loss(replica, rank, step).backward()
        for name, parameter in replica.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0) + parameter.grad.to_dense()
    return {name: total / dist.get_world_size() for name, total in sums.items()}


def copy_weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check_step(model, before, gradients):
    """Check that one step of an engine from `start` has changed the weights by ``gradients``."""
    for name, parameter in model.named_parameters():
        expected = before[name] - gradients.get(name, 0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def assert_equal_on_all_ranks(tensors):
    """Check that all ranks pass exactly equal tensors."""
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    all_ranks = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, flat)
    assert all(torch.equal(other, flat) for other in all_ranks)

"""A small model that `deepspeed.initialize` and `engine.initialize` train in the same way."""

import copy

import torch
import torch.distributed as dist

import engine
from engine.backends.deepspeed_import import import_deepspeed

ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
SGD = {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}
ALLOW_SGD = {"zero_allow_untested_optimizer": True}


class Net(torch.nn.Module):
    """Layers with a tied weight, frozen parameters and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm = torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)
        self.head, self.tied = (torch.nn.Linear(5, 3, bias=False) for _ in range(2))
        self.tied.weight = self.head.weight
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        x = self.body(x)
        return self.frozen(self.head(self.norm(x)) + self.tied(x))


def build_config(stage=0, precision="fp32", optimizer=ADAMW, **changes):
    return {
        "train_batch_size": 4,
        "optimizer": optimizer,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage},
        **changes,
    }


def build_groups(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": trained[:1], "weight_decay": 0.0}, {"params": trained[1:]}]


def start_deepspeed(config, **arguments):
    """Start plain DeepSpeed."""
    model, config = Net(), copy.deepcopy(config) | ALLOW_SGD
    return import_deepspeed().initialize(
        model=model, model_parameters=build_groups(model), config=config, **arguments
    )[0]


def start_onecycle(config, backend, model=None, *, groups=None, checkpoint=(), **arguments):
    """Start onecycle on a backend."""
    model = model or Net()
    config = copy.deepcopy(config) | (ALLOW_SGD if backend == "deepspeed" else {})
    config["engine"] = {"backend": backend, "checkpoint": dict(checkpoint)}
    groups = groups or build_groups(model)
    return engine.initialize(model=model, model_parameters=groups, config=config, **arguments)[0]


def train(trainer, first, last):
    """Train steps first, …, last - 1, whose data depends on step and rank; return the losses."""
    losses = []
    for step in range(first, last):
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 3, generator=generator).chunk(ranks)[rank]
        inputs = inputs.to(next(trainer.module.parameters()).dtype)
        loss = (trainer(inputs).float() - 1).pow(2).mean()
        trainer.backward(loss)
        trainer.step()
        losses.append(loss.item())
    return losses

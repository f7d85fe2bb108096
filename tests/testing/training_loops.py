"""Training loops like those in public scripts, which can run with several kinds of trainer.

A trainer is an engine, DeepSpeed's engine, or `ByHand`: PyTorch's optimizer, with the gradients of
all ranks averaged one by one before each step. All three have the same methods.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss, softplus

import engine

__all__ = ["BF16", "LOOPS", "run_loop", "run_loops"]

STEPS = 4
LR = 0.01


class Network(nn.Module):
    """A network of two layers with a method that computes the loss, as in many research scripts."""

    def __init__(self, width: int = 8, out: int = 2, *, has_norm: bool = False) -> None:
        super().__init__()
        self.encoder: nn.Module = nn.Linear(4, width)
        if has_norm:  # it cancels a bias, whose gradient would be a rounding error
            self.encoder = nn.Sequential(nn.Linear(4, width, bias=False), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, out)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.encoder(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encode(x))

    def compute_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return mse_loss(self(x).float(), y) + 0.1 * self.encode(x).float().pow(2).mean()


class LoRA(nn.Module):
    """A frozen 16-bit linear layer with a trained low-rank update in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 2).to(torch.bfloat16).requires_grad_(False)
        self.down = nn.Linear(4, 2, bias=False)
        self.up = nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class ByHand:
    """A trainer without a library: a PyTorch optimizer, and gradients averaged over the ranks."""

    def __init__(self, model: nn.Module, config: dict[str, Any], parameters: Any = None) -> None:
        self.module = model
        self._optimizer = torch.optim.AdamW(
            model.parameters() if parameters is None else parameters, lr=LR, weight_decay=0.0
        )
        self._accumulation = config.get("gradient_accumulation_steps", 1)
        self._is_boundary: bool | None = None
        self._micro_batches = 0
        self._is_bf16 = "bf16" in config

    def __call__(self, *inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._is_bf16):
            return self.module(*inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._is_boundary = is_boundary

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        (loss / self._accumulation).backward(retain_graph=retain_graph)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        self._micro_batches += 1
        counted = self._micro_batches % self._accumulation == 0
        if not (counted if self._is_boundary is None else self._is_boundary):
            return
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        self._optimizer.step()
        self._optimizer.zero_grad()


Start = Callable[..., Any]
"""Builds a trainer from a model and, if only some are trained, the parameters to train."""
Data = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Returns this rank's inputs and targets of a step."""


def train_plain(start: Start, data: Data) -> tuple[list[Any], list[Any]]:
    trainer, losses = start(Network()), []
    for step in range(STEPS):
        x, y = data(step)
        losses.append(mse_loss(trainer(x).float(), y))
        trainer.backward(losses[-1])
        trainer.step()
    return [trainer], losses


def train_gan(start: Start, data: Data) -> tuple[list[Any], list[Any]]:
    generator, discriminator = start(Network(out=4)), start(Network(out=1))
    losses = []
    for step in range(STEPS):
        x, _ = data(step)
        fake = generator(x.flip(0)).float()
        losses.append(
            softplus(-discriminator(x)).mean() + softplus(discriminator(fake.detach())).mean()
        )
        discriminator.backward(losses[-1])
        discriminator.step()
        losses.append(softplus(-discriminator(fake)).mean())
        generator.backward(losses[-1])
        generator.step()
        discriminator.zero_grad()
    return [generator, discriminator], losses


def train_siamese(
    start: Start, data: Data, *, has_norm: bool = False
) -> tuple[list[Any], list[Any]]:
    trainer, losses = start(Network(has_norm=has_norm)), []
    for step in range(STEPS):
        x, y = data(step)
        first, second = trainer(x), trainer(x.flip(0))
        losses.append((first - second).float().pow(2).mean() + mse_loss(trainer(-x).float(), y))
        trainer.backward(losses[-1])
        trainer.step()
    return [trainer], losses


def train_two_losses(start: Start, data: Data) -> tuple[list[Any], list[Any]]:
    trainer, losses = start(Network()), []
    for step in range(STEPS):
        x, y = data(step)
        out = trainer(x).float()
        losses += [mse_loss(out, y), out.pow(2).mean()]
        trainer.backward(losses[-2], retain_graph=True)
        trainer.backward(losses[-1])
        trainer.step()
    return [trainer], losses


def train_two_passes(
    start: Start, data: Data, *, has_norm: bool = False
) -> tuple[list[Any], list[Any]]:
    trainer, losses = start(Network(has_norm=has_norm)), []
    for step in range(STEPS):
        x, y = data(step)
        for inputs in (x, -x):
            losses.append(mse_loss(trainer(inputs).float(), y))
            trainer.backward(losses[-1])
        trainer.step()
    return [trainer], losses


def train_accumulation(start: Start, data: Data) -> tuple[list[Any], list[Any]]:
    trainer, losses = start(Network()), []
    for step in range(STEPS):
        outputs = [(trainer(data(step)[0] * scale), data(step)[1]) for scale in (1, -1)]
        for index, (out, y) in enumerate(outputs):
            losses.append(mse_loss(out.float(), y))
            trainer.set_gradient_accumulation_boundary(index == 1)
            trainer.backward(losses[-1])
            trainer.step()
    return [trainer], losses


def train_unfreezing(start: Start, data: Data) -> tuple[list[Any], list[Any]]:
    model = Network()
    model.encoder.requires_grad_(False)
    trainer, losses = start(model, list(model.parameters())), []
    for step in range(STEPS):
        x, y = data(step)
        losses.append(mse_loss(trainer(x).float(), y))
        trainer.backward(losses[-1])
        trainer.step()
        model.encoder.requires_grad_(True)
    return [trainer], losses


def train_lora(start: Start, data: Data) -> tuple[list[Any], list[Any]]:
    model = LoRA()
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer, losses = start(model, trained), []
    for step in range(STEPS):
        x, y = data(step)
        losses.append(mse_loss(trainer(x).float(), y))
        trainer.backward(losses[-1])
        trainer.step()
    return [trainer], losses


def train_moe(start: Start, data: Data) -> tuple[list[Any], list[Any]]:
    from deepspeed.moe.layer import MoE

    world_size = dist.get_world_size()
    experts = MoE(4, nn.Linear(4, 4), num_experts=2 * world_size, ep_size=world_size, k=1)
    trainer, losses = start(nn.ModuleDict({"moe": experts, "head": nn.Linear(4, 2)})), []
    for step in range(STEPS):
        x, y = data(step)
        out, *_ = trainer.module["moe"](x)
        losses.append(mse_loss(trainer.module["head"](out).float(), y))
        trainer.backward(losses[-1])
        trainer.step()
    return [trainer], losses


def train_loss_method(start: Start, data: Data) -> tuple[list[Any], list[Any]]:
    trainer, losses = start(Network()), []
    for step in range(STEPS):
        losses.append(trainer.compute_loss(*data(step)))
        trainer.backward(losses[-1])
        trainer.step()
    return [trainer], losses


def train_four_models(start: Start, data: Data) -> tuple[list[Any], list[Any]]:
    reference, reward = Network().requires_grad_(False), Network(out=1).requires_grad_(False)
    actor, critic = start(Network()), start(Network(out=1))
    losses = []
    for step in range(STEPS):
        x, _ = data(step)
        with torch.no_grad():
            target, advantage = reference(x), reward(x) - critic(x).float()
        out = actor(x).float()
        losses.append(mse_loss(out, target) - (advantage * out).mean())
        actor.backward(losses[-1])
        actor.step()
        losses.append(mse_loss(critic(x).float(), reward(x)))
        critic.backward(losses[-1])
        critic.step()
    return [actor, critic], losses


LOOPS = {
    "plain loop": train_plain,
    "GAN with two engines": train_gan,
    "siamese": train_siamese,
    "siamese with BatchNorm": functools.partial(train_siamese, has_norm=True),
    "two whole passes in one step": train_two_passes,
    "two passes with BatchNorm": functools.partial(train_two_passes, has_norm=True),
    "two losses of one forward pass": train_two_losses,
    "accumulation by hand": train_accumulation,
    "unfreezing": train_unfreezing,
    "LoRA on a bf16 base": train_lora,
    "MoE": train_moe,
    "loss through a method": train_loss_method,
    "four models as in RLHF": train_four_models,
}
BF16 = {"LoRA on a bf16 base"}
"""The loops that run in bf16; all others run in float32."""


def build_config(loop: str, stage: int = 0) -> dict[str, Any]:
    """Return the config of a loop, which DeepSpeed accepts too."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2 if loop == "accumulation by hand" else 1,
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "weight_decay": 0.0, "torch_adam": True},
        },
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        **({"bf16": {"enabled": True}} if loop in BF16 else {}),
    }


def start_engine(model: nn.Module, config: dict[str, Any], parameters: Any, backend: str) -> Any:
    """Return an engine of this library."""
    config = {**config, "engine": {"backend": backend}}
    return engine.initialize(model=model, config=config, model_parameters=parameters)[0]


def start_deepspeed(model: nn.Module, config: dict[str, Any], parameters: Any) -> Any:
    """Return an engine of plain DeepSpeed."""
    import deepspeed
    from deepspeed.ops.op_builder import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    parameters = list(model.parameters()) if parameters is None else parameters
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def run_loop(loop: str, kind: str, stage: int = 0) -> dict[str, Any]:
    """Run a loop on this rank, with trainers of one kind.

    Args:
        loop: a key of `LOOPS`.
        kind: "by hand", "torch", "deepspeed" (both engines of this library) or "plain deepspeed".
        stage: ZeRO stage.

    Returns:
        The losses and the final weights. If the trainer rejects the loop, the error message.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    config = build_config(loop, stage)

    def start(model: nn.Module, parameters: Any = None) -> Any:
        if kind == "by hand":
            return ByHand(model, config, parameters)
        if kind == "plain deepspeed":
            return start_deepspeed(model, config, parameters)
        return start_engine(model, config, parameters, kind)

    def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(4, 4, generator=generator)
        if kind == "plain deepspeed" and loop in BF16:
            x = x.bfloat16()
        return x, torch.randn(4, 2, generator=generator)

    torch.manual_seed(0)
    try:
        trainers, losses = LOOPS[loop](start, data)
    except Exception as error:  # noqa: BLE001  # DeepSpeed's checks are assertions, for example
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "losses": [float(loss.detach()) for loss in losses],
        "weights": [_gather(p) for trainer in trainers for p in trainer.module.parameters()],
    }


def run_loops(runs: list[tuple[str, str, int]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Call `run_loop` with each of several arguments, and return the results by argument."""
    return {run: run_loop(*run) for run in runs}


def _gather(parameter: nn.Parameter) -> list[float]:
    whole: Any = parameter
    if hasattr(parameter, "full_tensor"):
        whole = parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            whole = parameter.detach().clone()
    return whole.detach().float().flatten().tolist()

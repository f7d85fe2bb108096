"""Prepare the optimizer and the param groups that are passed to DeepSpeed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from engine.config import Config
from engine.config.master_weights import find_cpu_adam_key
from engine.training.arguments import check_are_in_model
from engine.training.gradient_averaging import find_sparse_weights
from engine.training.optimizers import OptimizerFactory, build_optimizer, is_buildable

__all__ = ["prepare_optimizer", "update_muon_momentum"]


def prepare_optimizer(
    model: nn.Module,
    optimizer: Optimizer | OptimizerFactory | None,
    config: Config,
    parameters: list[Any] | None,
) -> tuple[Optimizer | OptimizerFactory | None, list[Any] | None, list[Any]]:
    """Build the config's optimizer if PyTorch has it, and put MoE experts in separate param groups.

    Args:
        model: the user's module.
        optimizer: the user's optimizer, or a function that takes the parameters and returns an
            optimizer; if None, the config's optimizer is used.
        config: a validated config.
        parameters: tensors or param groups to train; if None, all parameters that require
            gradients.

    Returns:
        A tuple of the optimizer, the argument ``model_parameters`` for ``deepspeed.initialize``,
        and the tensors or param groups to train. The optimizer is None if DeepSpeed builds it or
        the run does not train.

    Raises:
        ValueError: the ZeRO stage does not support MoE layers, or the optimizer trains a parameter
            that is not in the model; or ZenFlow is enabled with gradient accumulation or the user's
            own optimizer.
    """
    _check_zenflow(config, optimizer)
    from deepspeed.moe.utils import configure_moe_param_groups, is_moe_param

    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = trainable if parameters is None else parameters
    has_experts = any(is_moe_param(p) for p in model.parameters())
    if has_experts and config.zero_stage == 3:
        raise ValueError(
            "DeepSpeed cannot train MoE layers with ZeRO stage 3. Set "
            '"zero_optimization": {"stage": 2}, or configure `expert_parallel` (AutoEP).'
        )
    if has_experts and not isinstance(optimizer, Optimizer):
        groups = parameters = configure_moe_param_groups(groups)
    block = config.optimizer
    can_build = block is not None and is_buildable(config.raw["optimizer"])
    if optimizer is None and can_build and find_cpu_adam_key(config.raw) is None:
        assert block is not None
        may_fuse = not find_sparse_weights(model)
        optimizer = build_optimizer(block, groups, may_fuse=may_fuse)
    trained = optimizer.param_groups if isinstance(optimizer, Optimizer) else groups
    check_are_in_model(model, trained, "DeepSpeed")
    return optimizer, parameters, trained


def _check_zenflow(config: Config, optimizer: object) -> None:
    if find_cpu_adam_key(config.raw) != "zero_optimization.zenflow":
        return
    if optimizer is not None:
        raise ValueError(
            "`optimizer` must not be passed with `zenflow`, because ZenFlow requires DeepSpeed's "
            'CPU Adam. Add "optimizer": {"type": "AdamW", "params": {"lr": 0.001}} to the config.'
        )
    if config.batch.accumulation != 1:
        raise ValueError(
            "`gradient_accumulation_steps` must be 1 with `zenflow`, got "
            f"{config.batch.accumulation}. ZenFlow accumulates gradients over "
            "`zenflow.update_interval` micro-batches instead."
        )


def update_muon_momentum(optimizer: Any) -> None:
    """Make Muon at ZeRO stage 3 use the current momentum of its param groups.

    Without offloading, DeepSpeed reads the momentum only when it builds the optimizer, so a
    momentum schedule would have no effect.

    Args:
        optimizer: DeepSpeed's optimizer. The function does nothing unless the optimizer is Muon
            at stage 3 without offloading.

    Raises:
        ValueError: the param groups have different momenta, which DeepSpeed does not support.
    """
    if getattr(optimizer, "muon_beta", None) is None or optimizer.offload_optimizer:
        return
    groups = optimizer.param_groups
    momenta = sorted({group["momentum"] for group in groups if group.get("use_muon")})
    if len(momenta) > 1:
        raise ValueError(
            "With Muon and ZeRO stage 3, all param groups must have the same momentum, got "
            f"{' and '.join(map(str, momenta))}. Use one momentum schedule for all of them."
        )
    optimizer.muon_beta = momenta[0]

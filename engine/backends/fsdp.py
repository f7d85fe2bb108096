"""The FSDP2 backend: PyTorch with parameters, gradients and optimizer states sharded across ranks.

The backend implements ZeRO's stages with FSDP2. Stage 3 gathers a block's parameters for the
forward pass and again for the backward pass. Stage 2 keeps the gathered parameters between the two
passes. Stage 1 is like stage 2, but reduces the gradients only once per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import skip_init
from torch.optim import Optimizer
from typing_extensions import override

from engine.backends.base import DTYPES
from engine.backends.layer_use import LayerUse
from engine.backends.model_setup import check_has_data
from engine.backends.pytorch import PyTorchBackend
from engine.backends.whole_weights import accept_whole_weights
from engine.checkpoint.optimizer_state import reshard
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.errors import MisuseError
from engine.training.activation_checkpointing import find_blocks
from engine.training.arguments import check_are_in_model
from engine.training.gradient_averaging import broadcast, find_sparse_weights
from engine.training.optimizers import OptimizerFactory
from engine.training.precision import cast_layer_inputs, find_methods

__all__ = ["FSDPBackend", "check_gradient_averaging", "shard"]

_SHARDED: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()
"""The settings that `shard` used for each model."""


class FSDPBackend(PyTorchBackend):
    """Backend that shards the model across ranks with FSDP2 (ZeRO stages 1 to 3)."""

    _input_casts: Sequence[Any] = ()
    """Handles of the hooks that cast the inputs of layers."""
    _has_unreduced = False
    """Whether gradients of earlier backward passes still have to be reduced across ranks."""
    _layer_use: LayerUse | None = None
    """Record of the layers that this rank has trained; None with a single rank."""
    _frozen_16_bits: list[tuple[str, nn.Parameter]]
    """Named parameters that stay in 16 bits because they were frozen when the engine was built."""

    @override
    def _place(self, model: nn.Module, device: torch.device) -> None:
        # `shard` moves one block at a time, because the whole model may not fit on a GPU.
        check_has_data(model)

    @override
    def _prepare_optimizer(
        self,
        model: nn.Module,
        optimizer: Optimizer | OptimizerFactory | None,
        parameters: list[Any] | None,
    ) -> Optimizer:
        # Sharding replaces the model's parameters, so shard before building the optimizer.
        if not isinstance(optimizer, Optimizer):
            sharded = shard(model, self._config, parameters, self._dtype, self._device)
            return _check_supported(super()._prepare_optimizer(model, optimizer, sharded))
        _check_supported(optimizer)
        groups = shard(model, self._config, optimizer.param_groups, self._dtype, self._device)
        for group, sharded_group in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = sharded_group["params"]
        return optimizer

    @override
    def _build_averager(self) -> None:
        check_gradient_averaging(self.ranks)  # FSDP itself averages gradients
        self._layer_use = LayerUse(self.model, self.optimizer, self.ranks)

    @override
    def _defer_steps(self) -> None:
        super()._defer_steps()
        if self._layer_use is not None:
            self._layer_use.checks_every_step = False

    @override
    def _set_precision(self) -> None:
        # FSDP gathers the parameters in the run's dtype, so autocast is not needed.
        if self._dtype is not None and self._config.model.cast_inputs:
            self._input_casts = cast_layer_inputs(self.model, self._dtype)
        self._frozen_16_bits = [
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.dtype in DTYPES.values() and not parameter.requires_grad
        ]

    @override
    def scale(self, loss: Tensor, accumulation: int, *, is_last: bool) -> Tensor:
        if self._config.model.master_weights:
            self._check_frozen()
        # Stages 2 and 3 reduce gradients after every micro-batch, because they store only sharded
        # gradients.
        if self._config.zero_stage == 1:
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(is_last)
        self._has_unreduced = not is_last and self._config.zero_stage == 1
        return super().scale(loss, accumulation, is_last=is_last)

    def _check_frozen(self) -> None:
        """Check that no 16-bit parameter was unfrozen after the engine was built.

        Such a parameter would have to be trained in float32, but FSDP cannot convert a sharded
        parameter.
        """
        for name, parameter in self._frozen_16_bits:
            if parameter.requires_grad:
                raise MisuseError(
                    f"`{name}` is a 16-bit parameter that was frozen when the engine was built, so "
                    "FSDP cannot train it in float32. Unfreeze the parameter, or convert it with "
                    "`.float()`, before calling `initialize`."
                )

    @override
    def _prepare_gradients(self) -> list[Tensor]:
        if self._has_unreduced:
            raise MisuseError(
                "With ZeRO stage 1, the last backward pass before an optimizer step must reduce "
                "the gradients. Call `set_gradient_accumulation_boundary(True)` before "
                "`trainer.backward(loss)`, and call `backward` outside of `no_sync()`."
            )
        if self._layer_use is not None:
            self._layer_use.check()
        # An evaluation after the last backward pass gathers weights, but this step changes the
        # weights.
        reshard(self.model)
        return super()._prepare_gradients()

    @override
    def _collect_gradients(self) -> list[Tensor]:
        return [_to_local(gradient) for gradient in super()._collect_gradients()]

    @override
    def _compute_norm(self, gradients: list[Tensor]) -> float:
        local_norm = super()._compute_norm(gradients)
        squares = torch.tensor(local_norm**2, dtype=torch.float64, device=self.ranks.device)
        dist.all_reduce(squares)
        return math.sqrt(float(squares))

    @override
    def _compute_norm_on_device(self, gradients: list[Tensor]) -> Tensor:
        squares = super()._compute_norm_on_device(gradients).square()
        dist.all_reduce(squares)
        return squares.sqrt()

    @override
    def has_gradients(self) -> bool:
        return self._has_unreduced or super().has_gradients()

    @override
    def zero_grad(self) -> None:
        super().zero_grad()
        if self._has_unreduced:
            self._has_unreduced = False
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    _clear_unreduced_gradients(module)

    @override
    def get_attribute(self, name: str) -> Any:
        if name not in find_methods(self.model) or hasattr(FSDPModule, name):
            return super().get_attribute(name)
        # A method that is called through the engine gathers the parameters. A method that is called
        # on the model does not, because scripts call methods such as `save_pretrained` on rank 0
        # only.
        register_fsdp_forward_method(self.model, name)
        method = getattr(self.model, name)
        delattr(self.model, name)
        return method

    @override
    def snapshot(self, reuse: Any = None) -> Any:
        reshard(self.model)
        return super().snapshot(reuse)

    @override
    def restore(self, snapshot: Any, *, only_check: bool = False) -> None:
        reshard(self.model)
        super().restore(snapshot, only_check=only_check)

    @override
    def destroy(self) -> None:
        for handle in self._input_casts:
            handle.remove()
        if self._layer_use is not None:
            self._layer_use.release()
        super().destroy()

    @override
    def describe(self) -> tuple[str, str]:
        size = self.ranks.world_size
        how = f"PyTorch FSDP2, ZeRO stage {self._config.zero_stage} over {size} ranks"
        return how, self._describe_precision()


def _check_supported(optimizer: Optimizer) -> Optimizer:
    """Check that an optimizer can update sharded parameters, and return the optimizer.

    Raises:
        ValueError: the optimizer cannot update sharded parameters.
    """
    # The masked assignment of Rprop and the norms of Adafactor fail for a DTensor.
    fails = isinstance(optimizer, torch.optim.Rprop | torch.optim.Adafactor)
    if fails:
        raise ValueError(
            f"`{type(optimizer).__name__}` does not support sharded parameters. Set "
            '"zero_optimization": {"stage": 0}, or choose a different optimizer.'
        )
    return optimizer


def _clear_unreduced_gradients(module: FSDPModule) -> None:
    """Clear the unreduced gradients that a module has accumulated on this rank.

    FSDP does not have a public method to clear these gradients.
    """
    group = module._get_fsdp_state()._fsdp_param_group  # noqa: SLF001  # private in torch
    for parameter in group.fsdp_params if group is not None else ():
        parameter.unsharded_accumulated_grad = None
        unsharded = getattr(parameter, "_unsharded_param", None)
        if unsharded is not None:
            unsharded.grad = None


def shard(
    model: nn.Module,
    config: Config,
    parameters: Iterable[Any] | None,
    dtype: torch.dtype | None,
    device: torch.device,
) -> list[Any]:
    """Shard a model's parameters across ranks, in place, and return the parameters to train.

    As with DDP, all ranks start with rank 0's weights. The model's blocks are moved to the device,
    copied from rank 0 and sharded one at a time, so the whole model need not fit on one GPU.

    Args:
        model: module to shard.
        config: config with the ZeRO stage, the precision, offloading and ``engine.wrap``.
        parameters: parameters or param groups to train; if None, all parameters that require
            gradients.
        dtype: 16-bit dtype to compute in; None keeps the parameters' dtype.
        device: device of this rank.

    Returns:
        The sharded parameters to train, with the same structure as ``parameters``.

    Raises:
        ValueError: a parameter does not belong to the model, a class in ``engine.wrap`` does not
            match any module of the model, or the model has sparse gradients or is already sharded
            with different settings.
    """
    wanted = None if parameters is None else list(parameters)
    check_are_in_model(model, wanted or (), "FSDP2")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = (config.zero_stage == 3, dtype, config.cpu_offload)
    if not _is_sharded(model, settings):
        _shard(model, config, dtype, device)
        _SHARDED[model] = settings
    sharded = dict(model.named_parameters())
    if wanted is None:
        return [parameter for parameter in sharded.values() if parameter.requires_grad]
    return [_to_sharded(each, names, sharded) for each in wanted]


def _is_sharded(model: nn.Module, settings: tuple[Any, ...]) -> bool:
    """Return whether an earlier engine has already sharded a model with the same settings.

    Raises:
        ValueError: the model is sharded with different settings.
    """
    if not isinstance(model, FSDPModule):
        return False
    if model not in _SHARDED:
        raise ValueError(
            "`model` must not be sharded by `fully_shard`, because `initialize` shards it as the "
            "config specifies. Remove the `fully_shard` call."
        )
    if _SHARDED[model] != settings:
        raise ValueError(
            "`model` is already sharded by FSDP2 with a different ZeRO stage, precision or "
            "offload setting. Build a new model, or use the same settings as the first engine."
        )
    return True


def _shard(
    model: nn.Module, config: Config, dtype: torch.dtype | None, device: torch.device
) -> None:
    sparse = find_sparse_weights(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in sparse:
            raise ValueError(
                f"FSDP2 cannot average the sparse gradient of `{name}`. Create the embedding "
                'with `sparse=False`, or set "zero_optimization": {"stage": 0}.'
            )
    has_16_bits = any(parameter.dtype.itemsize == 2 for parameter in model.parameters())
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32 if dtype or has_16_bits else None,
        cast_forward_inputs=False,  # it would also cast targets and positions
    )
    offloads = config.cpu_offload and device.type != "cpu"
    offload = CPUOffloadPolicy() if offloads else OffloadPolicy()
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "reshard_after_forward": config.zero_stage == 3,
        "mp_policy": policy,
        "offload_policy": offload,
    }
    copied: set[int] = set()
    for block in find_blocks(model, config.model.wrap_classes):
        _copy_from_rank_0(block, device, copied)
        fully_shard(block, **settings)
    _copy_from_rank_0(model, device, copied)
    # Keep the root's own parameters gathered after a forward pass, because a method of the model
    # may use the parameters after a call of the model.
    fully_shard(model, **{**settings, "reshard_after_forward": False})
    accept_whole_weights(model)


def _copy_from_rank_0(module: nn.Module, device: torch.device, copied: set[int]) -> None:
    """Move the unsharded tensors of a module to a device, and copy rank 0's values to all ranks.

    Args:
        module: block or model.
        device: device of this rank.
        copied: ids of the tensors that have already been copied. The ids of this module's tensors
            are added.
    """
    tensors = [
        tensor
        for tensor in (*module.parameters(), *module.buffers())
        if id(tensor) not in copied and not isinstance(tensor, DTensor)
    ]
    for tensor in tensors:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)
    broadcast(tensors)
    copied.update(map(id, tensors))


def _to_sharded(each: Any, names: dict[int, str], sharded: dict[str, nn.Parameter]) -> Any:
    if isinstance(each, dict):
        return {**each, "params": [_to_sharded(p, names, sharded) for p in each["params"]]}
    return sharded[names[id(each)]]


def _to_local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def check_gradient_averaging(ranks: Ranks) -> None:
    """Check that this build of torch averages FSDP gradients over the ranks.

    Raises:
        RuntimeError: the gradient that FSDP computes for a test weight is not the mean over the
            ranks.
    """
    # Leave the weight uninitialized, so that the script's random state does not change.
    probe = skip_init(nn.Linear, ranks.world_size, 1, bias=False, device=ranks.device)  # type: ignore[no-untyped-call]  # untyped in torch
    fully_shard(probe, mesh=init_device_mesh(ranks.device.type, (dist.get_world_size(),)))
    given = torch.full((1, ranks.world_size), float(ranks.rank + 1), device=ranks.device)
    probe(given).sum().backward()
    gradient = probe.weight.grad
    assert isinstance(gradient, DTensor)
    expected = (ranks.world_size + 1) / 2
    mean = gradient.full_tensor()
    if not torch.allclose(mean, torch.full_like(mean, expected)):
        raise RuntimeError(
            "This build of torch does not average FSDP gradients correctly on "
            f"{ranks.device.type}: expected {expected:g} for a test gradient, got "
            f'{mean.flatten().tolist()}. Set "zero_optimization": {{"stage": 0}}, or upgrade torch.'
        )

"""The DeepSpeed backend, which trains with DeepSpeed's engine."""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from engine.backends.base import DTYPES, Backend
from engine.backends.deepspeed_config import build_deepspeed_config
from engine.checkpoint.plain_values import read_values, write_values
from engine.config import Config
from engine.config.wording import count_noun
from engine.distributed.ranks import Ranks
from engine.errors import CheckpointError
from engine.training.optimizers import OptimizerFactory, build_optimizer, is_buildable

__all__ = ["DeepSpeedBackend"]

_SCALER = "grad_scaler.pt"


class DeepSpeedBackend(Backend):
    """Backend that trains with DeepSpeed's engine, including ZeRO and offloading.

    The optimizer is PyTorch's implementation unless the config requires DeepSpeed's, so that
    DeepSpeed compiles its own optimizers only if they are needed.

    Args:
        model: the user's module.
        optimizer: the user's optimizer, or a function that takes the parameters and returns one;
            if None, the config's optimizer is used.
        config: a validated config.
        ranks: rank, world size and device of this process. Even a single process needs an
            initialized process group.
        parameters: tensors or param groups to train; if None, all that require gradients.
        mpu: model-parallel unit for ``deepspeed.initialize``.
        mesh_param: shape of the device mesh for ``deepspeed.initialize``.

    Raises:
        ImportError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | OptimizerFactory | None,
        config: Config,
        ranks: Ranks,
        *,
        parameters: list[Any] | None = None,
        mpu: Any = None,
        mesh_param: Any = None,
    ) -> None:
        deepspeed = _import_deepspeed()
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = trainable if parameters is None else parameters
        block = config.optimizer
        if optimizer is None and block is not None and is_buildable(config.raw["optimizer"]):
            optimizer = build_optimizer(block, groups)
        num_parameters = _count_elements(
            optimizer.param_groups if isinstance(optimizer, Optimizer) else groups
        )
        # DeepSpeed reads the local rank from the environment. Set it in case no launcher did.
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=parameters,
            config=build_deepspeed_config(config, builds_optimizer=optimizer is None),
            mpu=mpu,
            mesh_param=mesh_param,
        )
        super().__init__(
            self.engine.module,
            self.engine.optimizer,
            ranks,
            num_parameters=num_parameters,
            basic_optimizer=self.engine.basic_optimizer,
        )
        self._config = config
        self._dtype = DTYPES.get(config.precision)

    @override
    def forward(self, *args: Any, last_micro_batch: bool, **kwargs: Any) -> Any:
        # In bf16 and fp16, DeepSpeed's weights have 16 bits. Cast the inputs to the same dtype, so
        # that scripts do not have to; autocast does the same.
        self.engine.set_gradient_accumulation_boundary(last_micro_batch)
        if self._dtype is not None:
            args, kwargs = _cast(args, self._dtype), _cast(kwargs, self._dtype)
        return self.engine(*args, **kwargs)

    @override
    def backward(self, loss: Tensor, accumulation: int, *, retain_graph: bool = False) -> None:
        scaled = accumulation == self.engine.gradient_accumulation_steps()
        loss = loss if scaled else loss / accumulation
        self.engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=scaled)

    @override
    def scale(self, loss: Tensor, accumulation: int) -> Tensor:
        del accumulation  # DeepSpeed divides by it in its backward hooks
        scaled: Tensor = self.engine.scale(loss)
        return scaled

    @override
    def step(self, *, divide_by: int = 1) -> bool:
        # Without ZeRO, DeepSpeed rejects a direct `loss.backward()`. With ZeRO, DeepSpeed's hooks
        # have already divided the gradients.
        del divide_by
        # Under torch_autocast without ZeRO, DeepSpeed counts a step as applied even if torch's
        # scaler skips it. The scaler lowers its scale after each skipped step, so compare scales.
        scaler = self.engine.torch_autocast_z0_gradscaler
        before = scaler.get_scale() if scaler else 0.0
        self.engine.set_gradient_accumulation_boundary(is_boundary=True)
        self.engine.step()
        applied: bool = self.engine.was_step_applied()
        if scaler and scaler.get_scale() < before:
            applied = False
            self.engine.skipped_steps += 1
        norm = self.engine.get_global_grad_norm()
        self.grad_norm = None if norm is None else float(norm)
        return applied

    @override
    def zero_grad(self) -> None:
        self.engine.zero_grad()

    @property
    @override
    def loss_scale(self) -> float:
        if scaler := self.engine.torch_autocast_z0_gradscaler:
            return float(scaler.get_scale())
        scale = getattr(self.optimizer, "cur_scale", None) or getattr(
            self.optimizer, "loss_scale", None
        )
        return float(scale) if scale and self._config.precision == "fp16" else 1.0

    @override
    def save(self, checkpoint_dir: Path, *, frozen: bool = True) -> None:
        self.engine.save_checkpoint(
            str(checkpoint_dir.parent),
            tag=checkpoint_dir.name,
            save_latest=False,
            exclude_frozen_parameters=not frozen,
        )
        scaler = self.engine.torch_autocast_z0_gradscaler
        if scaler and self.ranks.rank == 0:
            write_values(
                checkpoint_dir / _SCALER, scaler.state_dict()
            )  # DeepSpeed does not save it

    @override
    def save_async(
        self,
        checkpoint_dir: Path,
        group: dist.ProcessGroup | None,
        buffers: dict[str, Any],
        *,
        frozen: bool = True,
    ) -> Future[None]:
        del checkpoint_dir, group, buffers, frozen
        raise ValueError(
            "`engine.checkpoint.async` is not supported by the DeepSpeed backend. Set it to false, "
            "and configure DeepSpeed's asynchronous writer in the `checkpoint` section instead."
        )

    @override
    def load(
        self, checkpoint_dir: Path, *, optimizer: bool, strict: bool, frozen: bool = True
    ) -> None:
        path, _ = self.engine.load_checkpoint(
            str(checkpoint_dir.parent),
            tag=checkpoint_dir.name,
            load_module_strict=strict and frozen,
            load_optimizer_states=optimizer,
            load_lr_scheduler_states=False,
        )
        if path is None:
            raise CheckpointError(
                f"{checkpoint_dir} does not contain a DeepSpeed checkpoint. Load a checkpoint "
                "that was saved with the DeepSpeed backend."
            )
        scaler = self.engine.torch_autocast_z0_gradscaler
        if scaler and optimizer and (checkpoint_dir / _SCALER).is_file():
            scaler.load_state_dict(read_values(checkpoint_dir / _SCALER))

    @override
    def snapshot(self) -> Any:
        # Only DeepSpeed can save its state, so the snapshot is a temporary checkpoint.
        directory = [tempfile.mkdtemp(prefix="onecycle-") if self.ranks.rank == 0 else ""]
        dist.broadcast_object_list(directory)
        checkpoint_dir = Path(directory[0], "snapshot")
        self.save(checkpoint_dir)
        dist.barrier()  # every rank reads the files that rank 0 wrote
        return checkpoint_dir, self.grad_norm

    @override
    def restore(self, snapshot: Any) -> None:
        checkpoint_dir, self.grad_norm = snapshot
        self.load(checkpoint_dir, optimizer=True, strict=True)
        dist.barrier()
        if self.ranks.rank == 0:
            shutil.rmtree(checkpoint_dir.parent)

    @override
    def describe(self) -> str:
        ranks = self.ranks
        stage = f"ZeRO stage {self._config.zero_stage}"
        count = count_noun(ranks.world_size, "rank")
        return f"DeepSpeed, {stage}, {count}, {ranks.device}, {self._config.precision}"

    @override
    def get_attribute(self, name: str) -> Any:
        return getattr(self.engine, name)

    @override
    def destroy(self) -> None:
        self.engine.destroy()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors to a dtype, at any depth of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in {list, tuple}:
        return type(value)(_cast(each, dtype) for each in value)
    if type(value) is dict:
        return {name: _cast(each, dtype) for name, each in value.items()}
    return value


def _count_elements(groups: list[Any]) -> int:
    """Count the elements of all parameters, before DeepSpeed flattens and shards them."""
    members = (each["params"] if isinstance(each, dict) else [each] for each in groups)
    # Parameters that zero.Init has already sharded store their full size in `ds_numel`.
    return sum(getattr(p, "ds_numel", p.numel()) for params in members for p in params)


def _import_deepspeed() -> Any:
    try:
        import deepspeed
        from deepspeed.ops.op_builder import ShareMemCommBuilder
    except ImportError as error:
        raise ImportError(
            f"This config needs DeepSpeed, which cannot be imported: {error}. Run `pip install "
            'deepspeed`, or set "engine": {"backend": "torch"} and remove the keys that only '
            "DeepSpeed supports."
        ) from error
    # Otherwise, DeepSpeed spends minutes compiling a faster all-reduce in the first CPU run.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    return deepspeed

"""DeepSpeed underneath: its engine trains; our schedule drives its optimizer's param groups."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.backends.base import DTYPES
from engine.backends.deepspeed_config import deepspeed_config
from engine.checkpoint.plain_values import read_values, write_values
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.errors import CheckpointError
from engine.training.optimizers import build_optimizer, is_buildable

__all__ = ["DeepSpeedBackend"]

_SCALER = "grad_scaler.pt"


class DeepSpeedBackend:
    """Trains with DeepSpeed's engine: ZeRO, offloading, its precisions and its optimizers.

    The optimizer is built by PyTorch where it has one of that name, as on the other backend, and by
    DeepSpeed where a key asks for its own: nothing is compiled unless the config wants it.

    Args:
        model: the user's module.
        optimizer: one of the user's own, or a function from parameters to one.
        parameters: tensors or param groups to train; None: all that need gradients.
        config: proved right.
        ranks: this process's place; one process gets a group of its own.
        doors: further arguments of ``deepspeed.initialize``, as ``mpu``.

    Raises:
        ImportError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        parameters: Iterable[Any] | None,
        config: Config,
        ranks: Ranks,
        doors: Mapping[str, Any],
    ) -> None:
        deepspeed = _imported()
        self.ranks = ranks
        self.grad_norm: float | None = None
        self._config = config
        self._dtype = DTYPES.get(config.precision)
        block = config.optimizer
        trained = list(parameters) if parameters is not None else None
        if optimizer is None and block is not None and is_buildable(config.own["optimizer"]):
            wanted = trained or [p for p in model.parameters() if p.requires_grad]
            optimizer = build_optimizer(block, wanted)
        settings = deepspeed_config(config, builds_optimizer=optimizer is None)
        self.trained = _count(optimizer, trained, model)
        # DeepSpeed looks for its rank in the environment, which a launcher would have set.
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=trained,
            config=settings,
            **doors,
        )
        self.model: nn.Module = self.engine.module
        self.optimizer: Optimizer = self.engine.optimizer
        self.basic_optimizer: Optimizer = self.engine.basic_optimizer or self.optimizer

    def forward(self, *args: Any, last_micro_batch: bool, **kwargs: Any) -> Any:
        """Call the model in the run's precision; ranks meet when DeepSpeed has them meet.

        In bf16 and fp16 its weights have 16 bits. What it is given gets them too, so that a script
        needs no cast of its own, as it needs none where autocast runs the model.
        """
        self.engine.set_gradient_accumulation_boundary(last_micro_batch)
        if self._dtype is not None:
            args, kwargs = _cast(args, self._dtype), _cast(kwargs, self._dtype)
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, accumulation: int, *, retain_graph: bool = False) -> None:
        """Add the gradients of a loss, divided by the number of losses that an update averages."""
        scaled = accumulation == self.engine.gradient_accumulation_steps()
        loss = loss if scaled else loss / accumulation
        self.engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=scaled)

    def scale(self, loss: Tensor, accumulation: int) -> Tensor:
        """Scale as DeepSpeed does, which divides by the micro-batches in its backward hooks."""
        del accumulation
        scaled: Tensor = self.engine.scale(loss)
        return scaled

    def step(self, *, divide_by: int = 1) -> bool:
        """Let DeepSpeed update; return whether it did.

        Gradients of the script's own ``loss.backward()`` were divided by its hooks; where it has
        none (without ZeRO) it has refused that call. It tells an overflow by itself but for one
        case: under torch_autocast without ZeRO a scaler of torch skips, and DeepSpeed counts an
        update. A scaler that skipped has a lower scale.
        """
        del divide_by
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

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.engine.zero_grad()

    @property
    def loss_scale(self) -> float:
        """The factor on the loss that the next backward pass uses."""
        if scaler := self.engine.torch_autocast_z0_gradscaler:
            return float(scaler.get_scale())
        scale = getattr(self.optimizer, "cur_scale", None) or getattr(
            self.optimizer, "loss_scale", None
        )
        return float(scale) if scale and self._config.precision == "fp16" else 1.0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        dist.barrier()

    def mean(self, value: float) -> float:
        """Return the mean of a number over the ranks."""
        total = Tensor([value]).double().to(self.ranks.device)
        dist.all_reduce(total)
        return float(total) / self.ranks.world_size

    def save(self, place: Path, *, frozen: bool = True) -> None:
        """Write DeepSpeed's own checkpoint into the folder."""
        self.engine.save_checkpoint(
            str(place.parent),
            tag=place.name,
            save_latest=False,
            exclude_frozen_parameters=not frozen,
        )
        scaler = self.engine.torch_autocast_z0_gradscaler
        if scaler and self.ranks.rank == 0:
            write_values(place / _SCALER, scaler.state_dict())  # which DeepSpeed forgets

    def save_behind(
        self,
        place: Path,
        group: dist.ProcessGroup | None,
        arena: dict[str, Any],
        *,
        frozen: bool = True,
    ) -> Future[None]:
        """Refuse: DeepSpeed's files are written while training waits."""
        del place, group, arena, frozen
        raise ValueError(
            "`engine.checkpoint.async` must be false on DeepSpeed, whose `checkpoint` section has "
            "engines of its own for that, but is true instead."
        )

    def load(self, place: Path, *, optimizer: bool, strict: bool, frozen: bool = True) -> None:
        """Restore DeepSpeed's own checkpoint."""
        path, _ = self.engine.load_checkpoint(
            str(place.parent),
            tag=place.name,
            load_module_strict=strict and frozen,
            load_optimizer_states=optimizer,
            load_lr_scheduler_states=False,
        )
        if path is None:
            raise CheckpointError(f"{place} must hold DeepSpeed's files, but DeepSpeed finds none.")
        scaler = self.engine.torch_autocast_z0_gradscaler
        if scaler and optimizer and (place / _SCALER).is_file():
            scaler.load_state_dict(read_values(place / _SCALER))

    def snapshot(self) -> Any:
        """Return a folder with DeepSpeed's own checkpoint: its states are nobody else's to copy."""
        folder = [tempfile.mkdtemp(prefix="onecycle-") if self.ranks.rank == 0 else ""]
        dist.broadcast_object_list(folder)
        place = Path(folder[0], "snapshot")
        self.save(place)
        dist.barrier()  # what rank 0 alone has written is for all of them
        return place, self.grad_norm

    def restore(self, snapshot: Any) -> None:
        """Load the folder, and remove it."""
        place, self.grad_norm = snapshot
        self.load(place, optimizer=True, strict=True)
        dist.barrier()
        if self.ranks.rank == 0:
            shutil.rmtree(place.parent)

    def describe(self) -> str:
        """Return what trains here, in words, for the log."""
        ranks = self.ranks
        stage = f"ZeRO stage {self._config.zero_stage}"
        count = f"{ranks.world_size} rank{'s' * (ranks.world_size > 1)}"
        return f"DeepSpeed, {stage}, {count}, {ranks.device}, {self._config.precision}"

    def attribute(self, name: str) -> Any:
        """Return the attribute of DeepSpeed's engine, which passes on the model's."""
        return getattr(self.engine, name)

    def destroy(self) -> None:
        """Let DeepSpeed remove its hooks and buffers."""
        self.engine.destroy()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return floating-point tensors in a precision, at any depth of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in {list, tuple}:
        return type(value)(_cast(each, dtype) for each in value)
    if type(value) is dict:
        return {name: _cast(each, dtype) for name, each in value.items()}
    return value


def _count(optimizer: Any, trained: list[Any] | None, model: nn.Module) -> int:
    """Return how many numbers are to be updated, before DeepSpeed flattens and divides them."""
    groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else trained
    if groups is None:
        groups = [parameter for parameter in model.parameters() if parameter.requires_grad]
    members = (each["params"] if isinstance(each, dict) else [each] for each in groups)
    # Where zero.Init has divided them already, each knows what it was.
    return sum(getattr(p, "ds_numel", p.numel()) for params in members for p in params)


def _imported() -> Any:
    try:
        import deepspeed
        from deepspeed.ops.op_builder import ShareMemCommBuilder
    except ImportError as error:
        raise ImportError(
            f"DeepSpeed must be installed to run this config, but: {error}. `pip install "
            'deepspeed`, or set "engine": {"backend": "torch"} and remove what DeepSpeed alone '
            "honours."
        ) from error
    # Else the first run on a CPU waits minutes for a compiler, for a faster all-reduce in one host.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    return deepspeed

"""Base classes of the training backends."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.config.batch_sizes import BatchSizes
from engine.distributed.ranks import Ranks
from engine.training.deferred_step import DeferredStep
from engine.training.device_moves import move_to_device

__all__ = ["DTYPES", "Backend", "DeferringBackend", "compute_norm", "get_gradient"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The torch dtype of each 16-bit precision."""


def compute_norm(gradients: list[Tensor]) -> float:
    """Return the 2-norm of all gradients.

    The norm of finite gradients is finite, even if their squares overflow in float32.

    >>> compute_norm([torch.tensor([3.0]), torch.tensor([4.0])])
    5.0
    >>> compute_norm([torch.tensor([1e30, 1e30])]) > 1e30
    True
    """
    if not gradients:
        return 0.0
    # torch's clip_grad_norm_ also uses this private kernel, but takes twice as long.
    norms = torch._foreach_norm(gradients)  # noqa: SLF001  # private in torch
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if math.isinf(norm):  # the squares of large gradients overflow in float32
        wide = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in gradients]
        norm = float(torch.linalg.vector_norm(torch.stack(wide)))
    return norm


def get_gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient; if the gradient is sparse, return its stored values.

    The returned tensor shares memory with the gradient. The parameter must have a gradient.
    """
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad._values()  # noqa: SLF001  # `values()` would return a detached copy


class Backend(ABC):
    """Base class for backends. A backend runs the model and the optimizer on this rank."""

    ranks: Ranks
    model: nn.Module
    """The user's module, unwrapped, on this rank's device."""
    optimizer: Optimizer
    """The optimizer that the schedule controls."""
    basic_optimizer: Optimizer
    """The underlying torch optimizer, unwrapped."""
    num_parameters: int
    """Total number of elements in the parameters of the optimizer, before sharding."""
    grad_norm: float | None
    """2-norm of the latest step's gradients, before clipping; None before the first step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        ranks: Ranks,
        *,
        num_parameters: int,
        basic_optimizer: Optimizer | None = None,
    ) -> None:
        self.ranks = ranks
        self.model = model
        self.optimizer = optimizer
        self.basic_optimizer = basic_optimizer or optimizer
        self.num_parameters = num_parameters
        self.grad_norm = None
        self._is_on_cpu = ranks.device.type == "cpu"

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass in the config's precision, and return its output.

        Tensors in the arguments are moved to this rank's device.

        Args:
            args: positional arguments for the model.
            kwargs: keyword arguments for the model.
        """

    def _move_inputs(self, *inputs: Any) -> Any:
        """Move a model's inputs to this rank's device, as DDP and FSDP do, and return them."""
        if self._is_on_cpu:
            return inputs
        return move_to_device(inputs, self.ranks.device)

    def prepare_backward(self, *, is_last: bool) -> None:  # noqa: B027  # most backends do not need it
        """Prepare for a ``loss.backward()`` call in the script.

        Args:
            is_last: whether this is the last backward pass before the optimizer step. If true, the
                gradients are averaged across ranks during this pass.
        """

    @abstractmethod
    def backward(
        self, loss: Tensor, accumulation: int, *, is_last: bool, retain_graph: bool = False
    ) -> None:
        """Run the backward pass of a loss and accumulate its gradients.

        Args:
            loss: scalar tensor that requires grad.
            accumulation: number of micro-batches per step. The loss is divided by this number.
            is_last: whether this pass is the last backward pass before the optimizer step. If true,
                the gradients are averaged across ranks during this pass.
            retain_graph: whether to keep the graph for another backward pass.
        """

    @abstractmethod
    def scale(self, loss: Tensor, accumulation: int, *, is_last: bool) -> Tensor:
        """Scale a loss as `backward` does, and return it without running the backward pass.

        This is for scripts that call ``.backward()`` on the scaled loss themselves.
        """

    @abstractmethod
    def step(self, *, divide_by: int = 1) -> bool:
        """Clip the gradients, run the optimizer and clear the gradients.

        Args:
            divide_by: number to divide the gradients by; 1 if `backward` has already divided the
                loss.

        Returns:
            Whether the step was applied. A step with non-finite gradients is skipped.
        """

    def run_pipeline(
        self, batches: Iterator[Any] | None, *, trains: bool
    ) -> tuple[Tensor, bool] | None:
        """Run a pipeline-parallel model on the micro-batches of one step.

        Args:
            batches: iterator over micro-batches; None to use the data that the script passed to the
                pipeline's ``set_dataloader`` or ``set_dataiterator``.
            trains: whether to take an optimizer step.

        Returns:
            A tuple (mean loss, whether a step was applied), or None if the model is not a pipeline.
        """
        del batches, trains
        return None

    def has_gradients(self) -> bool:
        """Return whether any parameter of the optimizer has a gradient.

        A backend that cannot determine this returns True.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    return True
        return False

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def set_batch_sizes(self, batch: BatchSizes) -> None:  # noqa: B027  # most backends do not need it
        """Notify the backend that the batch sizes have changed.

        The default implementation does nothing. The DeepSpeed backend overrides it, because
        DeepSpeed's engine keeps its own copy of the batch sizes.
        """

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """The loss scale of the next backward pass."""

    def mean(self, value: float) -> float:
        """Return the mean of a number over all ranks. Every rank must call this method."""
        if self.ranks.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device="cpu")
        dist.all_reduce(total, group=self.ranks.control_group)
        return float(total) / self.ranks.world_size

    @abstractmethod
    def save(self, checkpoint_dir: Path, *, frozen: bool = True) -> None:
        """Save the model, the optimizer and the loss scale. Every rank must call this method.

        Args:
            checkpoint_dir: directory to write to.
            frozen: whether to include parameters that do not require gradients.
        """

    @abstractmethod
    def save_async(
        self,
        checkpoint_dir: Path,
        group: dist.ProcessGroup | None,
        buffers: dict[str, Any],
        *,
        frozen: bool = True,
    ) -> Future[None]:
        """Save the same state as `save`, but write the files in the background.

        The returned future completes when this rank has written its files.

        Args:
            checkpoint_dir: directory to write to.
            group: process group used only for saving; None for a single process.
            buffers: dict in which this method stores its copies of the tensors, so that the next
                save can reuse their memory. Pass an empty dict to the first save.
            frozen: whether to include parameters that do not require gradients.

        Raises:
            ValueError: this backend cannot save asynchronously.
        """

    @abstractmethod
    def load(
        self, checkpoint_dir: Path, *, optimizer: bool, strict: bool, frozen: bool = True
    ) -> None:
        """Load a checkpoint that `save` wrote. Every rank must call this method.

        Args:
            checkpoint_dir: directory to read from.
            optimizer: whether to restore the optimizer and the loss scale.
            strict: whether the checkpoint and the model must have the same parameters and buffers.
            frozen: whether the checkpoint includes the parameters that do not require gradients. If
                false, these parameters keep their values.

        Raises:
            CheckpointError: the checkpoint does not match the model.
        """

    @abstractmethod
    def snapshot(self, reuse: Any = None) -> Any:
        """Return a copy of the state of the model, the optimizer and the loss scaler.

        Every rank must call this method.

        Args:
            reuse: an earlier snapshot that is no longer needed. Its memory may be overwritten.
        """

    @abstractmethod
    def restore(self, snapshot: Any, *, only_check: bool = False) -> None:
        """Restore a state returned by `snapshot`, bit for bit. Every rank must call this method.

        Args:
            snapshot: return value of `snapshot`, possibly read from a checkpoint.
            only_check: if true, check that the snapshot fits this run, but do not restore it.

        Raises:
            ValueError: ``only_check`` is true, and a value in the snapshot is missing or has the
                wrong type or shape.
        """

    @abstractmethod
    def describe(self) -> tuple[str, str]:
        """Return descriptions of the parallelism and the precision, for the log."""

    def get_attribute(self, name: str) -> Any:
        """Return an attribute that the training engine does not define itself.

        The default implementation returns the model's attribute of the same name.

        Raises:
            AttributeError: the attribute does not exist.
        """
        return getattr(self.model, name)

    @abstractmethod
    def destroy(self) -> None:
        """Release memory and remove hooks. The model and the optimizer can still be used."""


class DeferringBackend(Backend):
    """Base class for backends that can start an optimizer step without waiting for the device."""

    deferred: DeferredStep | None = None
    """Object that starts steps and reads their results later; None if steps are not deferred."""

    @abstractmethod
    def start_step(self, loss: Tensor | None, *, divide_by: int = 1) -> None:
        """Start an optimizer step without waiting for its result.

        Call `finish_step` to get the result. Call this method only if `deferred` is not None.

        Args:
            loss: mean loss of the step on this rank; None if it is not needed.
            divide_by: number to divide the gradients by, as in `step`.
        """

    @abstractmethod
    def finish_step(self) -> tuple[bool, float]:
        """Wait for the step that `start_step` started.

        All communication between ranks happens in `start_step`, so ranks may call this method at
        different times.

        Returns:
            Whether the step was applied, and its mean loss over all ranks.

        Raises:
            FloatingPointError: the gradients overflow at the minimum loss scale.
        """

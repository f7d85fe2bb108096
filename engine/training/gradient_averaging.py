"""Average gradients across replicas of a model, as DDP does.

DDP averages gradients only if the loss comes from DDP's ``forward``. `GradientAverager` needs only
hooks on the parameters, so the loss can also come from a different method of the model, from the
unwrapped model or from several forward passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.distributed.ranks import Ranks, gather_if_different
from engine.errors import MisuseError

T = TypeVar("T", bound=Tensor)

__all__ = ["GradientAverager", "broadcast", "find_sparse_weights", "is_check_due"]

_FIRST_BUCKET_BYTES = 1 << 20
_BUCKET_BYTES = 25 << 20
_STEP_PERIOD = 4
_CHECKED_STEPS = 3
_CHECK_INTERVAL = 100


def is_check_due(steps: int) -> bool:
    """Return whether the ranks compare their work after this many steps.

    A comparison can block the host, so it is due only in the first three steps and in every
    hundredth.

    >>> [is_check_due(steps) for steps in (1, 4, 200)]
    [True, False, True]
    """
    return steps <= _CHECKED_STEPS or steps % _CHECK_INTERVAL == 0


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's tensors to all other ranks.

    Every rank must call this function with tensors of the same shapes, in the same order.
    """
    for bucket in _split([tensor.detach() for tensor in tensors], _get_type):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.broadcast(flat, src=0)
        parts = torch.split(flat, [tensor.numel() for tensor in bucket])
        views = [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
        torch._foreach_copy_(bucket, views)


def _get_type(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype


@dataclasses.dataclass
class _Bucket:
    """Parameters whose gradients are averaged in one all-reduce."""

    parameters: list[nn.Parameter]
    buffer: Tensor
    """Flat tensor that contains the gradients, a flag for each parameter (nonzero if it has a
    gradient), and the step number."""
    views: list[Tensor]
    """Views of the buffer: the gradient of each parameter, with its shape."""
    copied: set[int] = dataclasses.field(default_factory=set)
    """Indices of the gradients that the current backward pass has copied into the buffer."""
    work: Any = None
    """Handle of the running all-reduce; None if no all-reduce is in progress."""
    is_stale: bool = False
    """Whether a gradient changed after its all-reduce started."""

    def is_complete(self) -> bool:
        """Return whether every gradient of the bucket has been copied into the buffer."""
        return len(self.copied) == len(self.parameters)


class GradientAverager:
    """Object that averages the gradients of the trainable parameters across ranks.

    Inside `overlap`, each bucket of gradients is averaged as soon as all of its gradients have been
    computed, while the backward pass continues. `finish` averages all remaining gradients.
    Averaging a gradient twice is safe, because after the first time all ranks have the same values.
    If no rank has a gradient for a parameter, the gradient stays None.

    All ranks must run the same backward passes. To detect violations, the ranks compare step
    numbers and gradient norms in the first three steps and in every hundredth step.

    Args:
        model: replicated module; rank 0's parameters and buffers are copied to all ranks.
        optimizer: optimizer that holds the trainable parameters. Parameters can be added later.
        ranks: rank and world size of this process. The world size must be at least 2.

    Raises:
        ValueError: the ranks' models have different parameters.

    Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        self._optimizer = optimizer
        self._ranks = ranks
        self.checks_every_step = ranks.device.type == "cpu"
        """Whether the ranks compare step numbers in every step.

        True by default only on the CPU, because on a GPU the comparison blocks the host.
        """
        self._model = model if any(True for _ in model.buffers()) else None
        self._sparse = find_sparse_weights(model)
        self._parameters: list[nn.Parameter] = []
        self._buckets: list[_Bucket] = []
        self._nodes: list[torch.autograd.graph.Node] = []
        self._hooks: list[Any] = []
        self._next = 0  # index of the bucket that is averaged next
        self._is_overlapping = False
        self._is_averaged = False
        self._averaged: list[Tensor | None] = []
        self._steps = 0
        _check_models_match(model, ranks)
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        tensors |= {id(parameter): parameter for parameter in self._trained()}
        broadcast(tensors.values())
        self._update_buckets()

    def _trained(self) -> list[nn.Parameter]:
        return [
            parameter
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    @contextlib.contextmanager
    def overlap(self) -> Iterator[None]:
        """Average gradients while the backward pass is still running.

        Run the backward pass inside this context. Any remaining gradients are averaged when the
        context exits.
        """
        self._update_buckets()
        for bucket in self._buckets:
            bucket.copied.clear()
        self._is_overlapping = True
        try:
            yield
            self._average_all()
        except BaseException:
            self.release()  # drop the buffers, because an all-reduce may still write to them
            raise
        finally:
            self._is_overlapping = False
            self._next = 0

    def average(self) -> None:
        """Average the gradients across ranks if they have not been averaged yet."""
        self._update_buckets(keeps_frozen=True)  # newly frozen ones may have gradients
        if not self._is_averaged or self._are_replaced():
            self._average_all()

    def finish(self) -> None:
        """Call `average`, and copy the model's buffers from rank 0 to all other ranks.

        Call this method before each optimizer step.

        Raises:
            RuntimeError: the gradients differ between ranks although they were averaged, or the
                ranks have run different numbers of backward passes.
        """
        self.average()
        self._is_averaged, self._averaged = False, []  # `zero_grad` can free the gradients
        self._steps += 1
        if is_check_due(self._steps):
            self._check_steps_match()
            self._check_gradients_match()
        self._average_buffers()

    def release(self) -> None:
        """Remove the hooks from the parameters, and delete the buckets."""
        for hook in self._hooks:
            hook.remove()
        self._nodes, self._hooks, self._buckets = [], [], []
        self._parameters, self._averaged = [], []
        self._is_averaged = False

    def _update_buckets(self, *, keeps_frozen: bool = False) -> None:
        """Rebuild the buckets if parameters were added, frozen or unfrozen.

        If ``keeps_frozen`` is true, newly frozen parameters stay in the buckets.
        """
        trained = self._trained()
        if keeps_frozen:
            trained += [p for p in self._parameters if not p.requires_grad]
        if [id(p) for p in trained] == [id(p) for p in self._parameters]:
            return
        self.release()
        self._parameters = trained
        dense = [parameter for parameter in trained if id(parameter) not in self._sparse]
        # The last layers' gradients come first.
        for members in _split(reversed(dense), _buffer_type):
            bucket = _build_bucket(members)
            self._buckets.append(bucket)
            for index, parameter in enumerate(members):
                self._add_hook(parameter, functools.partial(self._on_gradient, bucket, index))
        for parameter in trained:
            if id(parameter) in self._sparse:
                self._add_hook(parameter, self._on_sparse)

    def _add_hook(self, parameter: nn.Parameter, hook: Callable[..., None]) -> None:
        """Register a hook that runs after a gradient is accumulated and after the user's hooks."""
        if parameter.requires_grad:
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            self._nodes.append(node)  # the parameter itself keeps no reference to its node
            self._hooks.append(node.register_hook(hook))

    def _on_gradient(self, bucket: _Bucket, index: int, *_: object) -> None:
        self._is_averaged = False
        if not self._is_overlapping:
            return
        if bucket.work is not None:
            bucket.is_stale = True
            return
        self._copy(bucket, index)  # while the gradient is in the CPU cache
        bucket.copied.add(index)
        # All ranks must start the all-reduces in the same order.
        while self._next < len(self._buckets) and self._buckets[self._next].is_complete():
            self._start(self._buckets[self._next])
            self._next += 1

    def _on_sparse(self, *_: object) -> None:
        self._is_averaged = False

    @torch.no_grad()
    def _average_all(self) -> None:
        for bucket in self._buckets[self._next :]:
            self._start(bucket)
        for bucket in self._buckets:
            self._finish(bucket)
        for bucket in self._buckets:
            if bucket.is_stale:
                bucket.is_stale = False
                self._start(bucket)
                self._finish(bucket)
        for parameter in self._parameters:
            if id(parameter) in self._sparse:
                self._average_sparse(parameter)
        self._averaged = [parameter.grad for parameter in self._parameters]
        self._is_averaged = True

    @torch.no_grad()
    def _copy(self, bucket: _Bucket, index: int) -> bool:
        """Copy a gradient, divided by the world size, into the bucket's buffer.

        For a parameter without a gradient, copy zeros. Return whether the parameter has a gradient.
        """
        gradient, view = bucket.parameters[index].grad, bucket.views[index]
        if gradient is None:
            view.zero_()
            return False
        # Divide before the sum, because the sum may overflow.
        torch.div(gradient.to(view.dtype), self._ranks.world_size, out=view)
        return True

    @torch.no_grad()
    def _start(self, bucket: _Bucket) -> None:
        flags = bucket.buffer[-len(bucket.parameters) - 1 : -1]
        flags.fill_(1.0 / self._ranks.world_size)
        for index in range(len(bucket.parameters)):
            if index not in bucket.copied and not self._copy(bucket, index):
                flags[index] = 0.0
        bucket.copied.clear()
        self._all_reduce(bucket)

    def _all_reduce(self, bucket: _Bucket) -> None:
        bucket.buffer[-1] = self._steps % _STEP_PERIOD / self._ranks.world_size
        bucket.work = dist.all_reduce(bucket.buffer, async_op=True)

    @torch.no_grad()
    def _finish(self, bucket: _Bucket) -> None:
        bucket.work.wait()
        bucket.work = None
        if self.checks_every_step or is_check_due(self._steps):
            self._check_step(bucket)
        if bucket.is_stale:
            return  # copying the mean would discard newer gradients
        size = len(bucket.parameters)
        present = [i for i, each in enumerate(bucket.parameters) if each.grad is not None]
        gradients: Any = [bucket.parameters[i].grad for i in present]
        torch._foreach_copy_(gradients, [bucket.views[i] for i in present])
        if len(present) == size:
            return
        flags = bucket.buffer[-size - 1 : -1].tolist()
        for parameter, view, flag in zip(bucket.parameters, bucket.views, flags, strict=True):
            if parameter.grad is None and flag > 0:
                parameter.grad = view.to(parameter.dtype, copy=True)

    def _average_sparse(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter).to_sparse(1)  # sparse rows, as in `Embedding`
        parameter.grad = (gradient / self._ranks.world_size).coalesce()
        dist.all_reduce(parameter.grad)

    def _average_buffers(self) -> None:
        """Copy the model's buffers, such as BatchNorm's running mean, from rank 0 to all ranks."""
        if self._model is not None:
            broadcast(self._model.buffers())

    def _are_replaced(self) -> bool:
        """Return whether any parameter's ``.grad`` was replaced after gradient averaging."""
        return any(
            parameter.grad is not averaged
            for parameter, averaged in zip(self._parameters, self._averaged, strict=True)
        )

    def _check_step(self, bucket: _Bucket) -> None:
        own = self._steps % _STEP_PERIOD
        if abs(float(bucket.buffer[-1]) - own) > 0.5 / self._ranks.world_size:
            raise MisuseError(
                "The ranks have run different numbers of backward passes, so gradients from "
                "different steps were averaged together. Call `trainer.backward(loss)` the same "
                "number of times on every rank."
            )

    @torch.no_grad()
    def _check_steps_match(self) -> None:
        """Check that all ranks have finished the same number of steps.

        To compare the step numbers, all-reduce the buffer of the first bucket, which also holds the
        step number. A rank that is still averaging gradients all-reduces a buffer of the same size,
        so the two calls match, and the check detects the difference. Any other collective operation
        would hang.
        """
        for bucket in self._buckets[:1]:
            bucket.buffer.zero_()
            self._all_reduce(bucket)
            bucket.work.wait()
            bucket.work = None
            self._check_step(bucket)

    def _check_gradients_match(self) -> None:
        own = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for parameter in self._parameters:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                own += torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
        all_ranks = [torch.empty_like(own) for _ in range(self._ranks.world_size)]
        dist.all_gather(all_ranks, own)
        values = [float(value) for value in all_ranks]
        for rank, value in enumerate(values):
            are_finite = math.isfinite(value) or math.isfinite(values[0])
            if are_finite and not math.isclose(value, values[0], rel_tol=1e-3):
                raise MisuseError(
                    "The gradients differ between ranks: the sum of the gradient norms is "
                    f"{values[0]:g} on rank 0 and {value:g} on rank {rank}. After "
                    "`trainer.backward(loss)`, change `.grad` in the same way on every rank."
                )


def _split(tensors: Iterable[T], get_type: Callable[[T], object]) -> list[list[T]]:
    """Split tensors into buckets, each of which is communicated as one buffer.

    Each bucket contains only tensors for which ``get_type`` returns the same value. The first
    bucket is small, so that gradient averaging starts early in the backward pass.

    Args:
        tensors: tensors to broadcast, or parameters whose gradients are averaged.
        get_type: function that returns the device and dtype of a tensor's buffer.
    """
    buckets: list[list[T]] = []
    size, limit = 0, 0
    for parameter in tensors:
        is_alike = bool(buckets) and get_type(buckets[-1][0]) == get_type(parameter)
        if not is_alike or size >= limit:
            limit = _BUCKET_BYTES if buckets else _FIRST_BUCKET_BYTES
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets


def _buffer_type(parameter: nn.Parameter) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype for averaging a parameter's gradient.

    The dtype is at least float32, because sums of 16-bit gradients lose precision.
    """
    return parameter.device, torch.promote_types(parameter.dtype, torch.float32)


def _build_bucket(parameters: list[nn.Parameter]) -> _Bucket:
    device, dtype = _buffer_type(parameters[0])
    sizes = [parameter.numel() for parameter in parameters]
    buffer = torch.zeros(sum(sizes) + len(parameters) + 1, device=device, dtype=dtype)
    parts = torch.split(buffer[: sum(sizes)], sizes)
    views = [part.view(each.shape) for part, each in zip(parts, parameters, strict=True)]
    return _Bucket(parameters, buffer, views)


def find_sparse_weights(model: nn.Module) -> set[int]:
    """Return the `id` of each embedding weight that gets sparse gradients."""
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    }


def _check_models_match(model: nn.Module, ranks: Ranks) -> None:
    own = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    models = gather_if_different(ranks, own)
    for rank, other in enumerate(models):
        if other != models[0]:
            pairs = zip(models[0], other, strict=False)
            here, there = next(
                ((a, b) for a, b in pairs if a != b),
                (f"{len(models[0])} parameters", f"{len(other)}"),
            )
            raise ValueError(
                f"`model` must have the same parameters on all ranks, got {here} on rank 0 and "
                f"{there} on rank {rank}. Build the same model on every rank."
            )

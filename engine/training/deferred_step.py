"""Optimizer steps that the device can skip without waiting for the host.

A step with non-finite gradients must be skipped. If the host decides whether to skip a step, it
must wait for the backward pass to finish, and the device is then idle until the host starts the
optimizer step. With `DeferredStep`, the device decides, and the host reads the decision later.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.training.loss_scaling import LossScaler

__all__ = ["DeferredStep", "StepResult", "can_skip_on_device", "compute_norm_on_device"]


def can_skip_on_device(optimizer: Optimizer, device: torch.device) -> bool:
    """Return whether a tensor on ``device`` can make the optimizer's kernels skip a step.

    The result is true only if the optimizer uses PyTorch's fused kernels and all parameters are on
    ``device``.

    >>> weight, device = torch.nn.Parameter(torch.ones(1)), torch.device("cpu")
    >>> can_skip_on_device(torch.optim.AdamW([weight], fused=True), device)
    True
    >>> can_skip_on_device(torch.optim.AdamW([weight]), device)
    False
    """
    groups = optimizer.param_groups
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused") and all(each.device == device for each in group["params"])
        for group in groups
    )


def compute_norm_on_device(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Return the 2-norm of all gradients as a float64 tensor on the device.

    The norm of finite gradients is finite, even if their squares overflow in float32.

    >>> device = torch.device("cpu")
    >>> compute_norm_on_device([torch.tensor([3.0]), torch.tensor([4e30])], device).item()
    4...e+30
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(gradients, 2, torch.float64)  # noqa: SLF001  # as in `compute_norm`
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


class StepResult:
    """The result of a deferred `Engine.step`: whether the optimizer step was applied.

    Use the result like a bool. ``bool(result)``, ``result == True`` and ``repr(result)`` wait until
    the device has finished the step. ``result is True`` is always false.

    Args:
        settle: function that reads the outcome from the device and sets `is_applied`.

    >>> result = StepResult(lambda: setattr(result, "is_applied", False))
    >>> "applied" if result else "skipped"
    'skipped'
    >>> result, result == False
    (False, True)
    """

    __slots__ = ("_settle", "is_applied")

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle: Callable[[], None] | None = settle
        self.is_applied: bool | None = None
        """Whether the step was applied; None until the host has read the outcome."""

    def __bool__(self) -> bool:
        settle, self._settle = self._settle, None
        if self.is_applied is None and settle is not None:
            settle()
        return bool(self.is_applied)

    def __eq__(self, other: object) -> bool:
        return bool(self) == (bool(other) if isinstance(other, StepResult) else other)

    def __hash__(self) -> int:
        return hash(bool(self))

    def __repr__(self) -> str:
        return repr(bool(self))

    def __reduce__(self) -> tuple[type[bool], tuple[bool]]:
        return bool, (bool(self),)  # a copy is a plain bool


class DeferredStep:
    """Runner that enqueues optimizer steps, and checks later whether the device skipped them.

    The backward pass leaves unclipped gradients in ``.grad``, multiplied by a factor ``scale``. The
    fused kernel divides them by

        grad_scale = scale * max(1, (norm + 1e-6) / clipping)

    where ``norm`` is the norm of the unscaled gradients. If the norm is not finite, the kernel
    skips the step. After the step, the norm and the loss are copied to pinned memory. `read` waits
    for this copy. Call `read` after the start of the next backward pass, so that the device stays
    busy and the host rarely waits.

    With dynamic loss scaling, the scale for the next backward pass depends on whether this step is
    skipped. The host does not know this yet, so it computes a scale for each case, and the device
    selects one.

    Args:
        optimizer: optimizer for which `can_skip_on_device` is true.
        clipping: maximum norm of the gradients; 0 to disable clipping.
        scaler: loss scaler of the run, which `read` updates; None if the loss is not scaled.
        device: device of the parameters.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5, fused=True)
    >>> deferred = DeferredStep(optimizer, 0.0, None, weight.device)
    >>> for gradient in (math.nan, 1.0):
    ...     weight.grad = torch.tensor([gradient])
    ...     norm = compute_norm_on_device([weight.grad], weight.device)
    ...     deferred.start(norm, 1.0, None)
    ...     deferred.read(), weight.item()
    ((nan, nan), 1.0)
    ((1.0, 1.0), 0.5)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clipping: float,
        scaler: LossScaler | None,
        device: torch.device,
    ) -> None:
        self.scale: Tensor | None = None
        """Device tensor with the loss scale for the next backward pass.

        None if the host knows the scale.
        """
        self.has_skipped = False
        """Whether the most recent step with a known outcome was skipped."""
        self._optimizer = optimizer
        self._clipping = clipping
        self._scaler = scaler
        self._is_limited = False  # whether `scale` was limited to float16
        is_host = device.type == "cpu"
        values = torch.zeros(2, dtype=torch.float64, pin_memory=not is_host)
        self._target = values
        self._values = values.numpy()  # the same memory
        self._event = None if is_host else torch.get_device_module(device).Event()

    def start(self, norm: Tensor, scale: float, loss: Tensor | None) -> None:
        """Start an optimizer step, which the device skips if ``norm`` is not finite.

        Args:
            norm: 2-norm of the unscaled gradients; float64 scalar on the device.
            scale: number by which the step divides the gradients in ``.grad`` to unscale them.
            loss: scalar tensor with the loss that `read` returns. If None, `read` returns the norm
                in place of the loss.
        """
        found_inf = (~torch.isfinite(norm)).float()
        optimizer = self._optimizer
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # as torch's GradScaler does
        optimizer.grad_scale = self._find_divisor(norm, scale)  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        if self._scaler is not None:
            applied, skipped = self._scaler.find_next_scales()
            if applied != skipped:
                self.scale = (found_inf * (skipped - applied)).add_(applied)
        shown = norm if loss is None else loss.to(norm.device, norm.dtype, non_blocking=True)
        self._target.copy_(torch.stack((norm, shown)), non_blocking=True)
        if self._event is not None:
            self._event.record()

    def _find_divisor(self, norm: Tensor, scale: float) -> Tensor | None:
        """Return the value by which to divide the gradients, or None if they stay unchanged."""
        if self._clipping > 0:
            divisor = torch.clamp((norm + 1e-6) / self._clipping, min=1.0) * scale
            return divisor.float()
        return None if scale == 1.0 else norm.new_full((), scale, dtype=torch.float32)

    def limit_to_float16(self) -> None:
        """Limit the loss scale for the next backward pass; see `LossScaler.limit_to_float16`."""
        assert self._scaler is not None
        if self.scale is None:
            self._scaler.limit_to_float16()
        else:
            self.scale.clamp_(max=self._scaler.max_float16_scale)
            self._is_limited = True

    def read(self) -> tuple[float, float]:
        """Wait until the most recent step has finished, and return its gradient norm and loss.

        This also updates the loss scaler.

        Raises:
            FloatingPointError: the gradients overflow at the minimum loss scale.
        """
        if self._event is not None:
            self._event.synchronize()
        norm, loss = float(self._values[0]), float(self._values[1])
        self.has_skipped = not math.isfinite(norm)
        is_limited, self._is_limited, self.scale = self._is_limited, False, None
        if self._scaler is not None:
            self._scaler.update(overflow=self.has_skipped)
            if is_limited:
                self._scaler.limit_to_float16()
        return norm, loss

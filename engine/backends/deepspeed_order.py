"""Reject sequences of forward and backward passes that DeepSpeed does not support."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.errors import MisuseError

__all__ = ["BackwardOrder"]

_UNSUPPORTED = ("Direct calls to tensor.backward()", "The size of tensor a (0)")
"""Substrings of DeepSpeed's error messages about unsupported backward passes."""


class BackwardOrder:
    """Checker that rejects backward passes for which DeepSpeed would compute wrong gradients.

    DeepSpeed 0.19 silently loses gradients or computes wrong gradients in these cases:

    - With ZeRO stage 1 or 2, `backward` is called again after the backward pass that is marked as
      the last of the step. DeepSpeed averages the gradients in the marked pass, so the gradients of
      later passes are wrong.
    - With ZeRO stage 3, two forward passes are followed by two backward passes. DeepSpeed releases
      the parameters after the first backward pass, so the gradients of the second pass are wrong.
    - With master weights at any stage, a parameter is unfrozen after the engine is built. DeepSpeed
      trains only the parameters that required gradients when the engine was built.

    Args:
        engine: DeepSpeed's engine.
        zero_stage: ZeRO stage of the run.
    """

    def __init__(self, engine: Any, zero_stage: int) -> None:
        self._zero_stage = zero_stage
        has_master_weights = engine.optimizer is not engine.basic_optimizer
        self._frozen = [
            (name, parameter)
            for name, parameter in engine.module.named_parameters()
            if has_master_weights and not parameter.requires_grad
        ]
        self._forwards = 0  # since the last backward pass
        self._has_several_forwards = False  # before the last backward pass
        self._has_averaged = False  # in this step
        self._hook = engine.module.register_forward_pre_hook(self._count_forward)

    def _count_forward(self, *_: Any) -> None:
        self._forwards += torch.is_grad_enabled()

    def check(self, *, is_last: bool) -> None:
        """Check that DeepSpeed will compute correct gradients in the next backward pass.

        Raises:
            RuntimeError: DeepSpeed would lose gradients or compute wrong gradients.
        """
        if self._has_averaged and self._zero_stage in {1, 2}:
            raise MisuseError(
                f"With ZeRO stage {self._zero_stage}, DeepSpeed averaged the gradients of this "
                "step in the previous backward pass, so `backward` must not be called again "
                "before `step`. Sum the losses and call `backward` once. Alternatively, call "
                "`set_gradient_accumulation_boundary(False)` before the first `backward` call and "
                "`set_gradient_accumulation_boundary(True)` before the last."
            )
        if self._zero_stage == 3 and self._forwards == 0 and self._has_several_forwards:
            raise MisuseError(
                "With ZeRO stage 3, DeepSpeed computes wrong gradients if `backward` is called "
                "twice after two forward passes. Call `backward` after each forward pass, or sum "
                "the losses and call `backward` once."
            )
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise MisuseError(
                    f"`{name}` was frozen when the engine was built, so DeepSpeed does not train "
                    "it. Unfreeze the parameter before calling `initialize`, or set "
                    '"engine": {"backend": "torch"}.'
                )
        self._has_several_forwards, self._forwards = self._forwards > 1, 0
        self._has_averaged = is_last

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Add a suggested fix to DeepSpeed's errors about unsupported backward passes.

        Run the backward pass inside this context. DeepSpeed does not support, for example, the
        backward pass of a GAN's generator, because the generator's loss depends on two engines.
        """
        try:
            yield
        except (AssertionError, RuntimeError) as error:
            is_assertion = isinstance(error, AssertionError) and _is_raised_by_deepspeed(error)
            if not is_assertion and not any(part in str(error) for part in _UNSUPPORTED):
                raise
            reason = " ".join(str(error).split()).rstrip(".") or "an assertion failed"
            raise MisuseError(
                f"DeepSpeed does not support this backward pass: {reason}. "
                "Call `backward` once per forward pass. If the loss depends on the model of "
                "another engine, as in a GAN, freeze that model with `requires_grad_(False)` for "
                'the forward and backward pass, or set "engine": {"backend": "torch"}.'
            ) from error

    def start_step(self) -> None:
        """Reset the record of forward and backward passes at the start of a step."""
        self._has_averaged = self._has_several_forwards = False

    def release(self) -> None:
        """Remove the hook that counts the forward passes of the engine."""
        self._hook.remove()


def _is_raised_by_deepspeed(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "deepspeed" in Path(frames[-1].filename).parts

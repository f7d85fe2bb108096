"""Static and dynamic loss scaling for fp16, with DeepSpeed's algorithm and config keys."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from engine.config import LossScaling
from schedules.core.fields import Range
from schedules.core.saved_state import Count

__all__ = ["LossScaler", "ScalerState"]

_MAX_FLOAT16_SCALE = 2.0**15
_MIN_FLOAT16 = 2.0**-24


@dataclass(frozen=True)
class ScalerState:
    """Fields and types of the dict that `LossScaler.state_dict` returns."""

    scale: Annotated[float, Range(above=0)]
    hysteresis: Count
    clean_updates: Count


class LossScaler:
    """Static or dynamic loss scale that prevents the underflow of fp16 gradients.

    If ``loss_scale`` is above 0, the scale is static. If ``loss_scale`` is 0, the scale is dynamic
    and starts at ``2 ** initial_scale_power``. The first ``hysteresis - 1`` overflows do not change
    the scale. Every later overflow halves the scale, down to ``min_loss_scale``. If
    ``min_loss_scale`` is 0, the minimum is the smallest positive float16 number. After
    ``loss_scale_window + 1`` consecutive steps without overflow, the scale doubles. The scale
    doubles again after every further ``loss_scale_window`` steps without overflow. Doubling the
    scale resets the count of overflows. With ``consecutive_hysteresis``, every step without
    overflow resets the count.

    >>> scaler = LossScaler(LossScaling(0, 4, 2, 1, False, 1))
    >>> for overflow in (True, False, False, False):
    ...     scaler.update(overflow=overflow)
    ...     print(scaler.scale)
    8.0
    8.0
    8.0
    16.0

    Source: ``DynamicLossScaler`` in deepspeed/runtime/fp16/loss_scaler.py.
    """

    def __init__(self, settings: LossScaling) -> None:
        self._settings = settings
        self._dynamic = settings.loss_scale == 0
        self.scale = float(settings.loss_scale or 2**settings.initial_scale_power)
        self._hysteresis = settings.hysteresis
        self._clean_steps = 0

    def limit_to_float16(self) -> None:
        """Limit a dynamic scale to the largest power of two that float16 can represent.

        The backward pass of a float16 loss starts with a gradient equal to the scale. A larger
        scale would be infinite in float16, so every step at that scale would be skipped.
        """
        if self._dynamic and self.scale > _MAX_FLOAT16_SCALE:
            self.scale = _MAX_FLOAT16_SCALE

    @property
    def max_float16_scale(self) -> float:
        """Maximum scale for a float16 loss; infinite if the scale is static."""
        return _MAX_FLOAT16_SCALE if self._dynamic else math.inf

    def find_next_scales(self) -> tuple[float, float]:
        """Return the scale after a step without overflow, and the scale after a step with overflow.

        >>> LossScaler(LossScaling(0, 4, 2, 1, False, 1)).find_next_scales()
        (16.0, 8.0)
        """
        scales = []
        for overflow in (False, True):
            scaler = copy.copy(self)
            with contextlib.suppress(FloatingPointError):  # `update` raises it after the step
                scaler.update(overflow=overflow)
            scales.append(scaler.scale)
        return scales[0], scales[1]

    def update(self, *, overflow: bool) -> None:
        """Update a dynamic scale after a step. A static scale does not change.

        Args:
            overflow: whether the gradients of the step overflowed.

        Raises:
            FloatingPointError: if the gradients overflow at the minimum scale.
        """
        if not self._dynamic:
            return
        settings = self._settings
        # At an even smaller scale, a float16 loss or gradient would be 0.
        minimum = settings.min_loss_scale or _MIN_FLOAT16
        if overflow:
            self._clean_steps = 0
            if self._hysteresis > 1:
                self._hysteresis -= 1
            elif self.scale <= minimum:
                raise FloatingPointError(
                    "Training has diverged: the gradients overflow even at the minimum loss scale, "
                    f"{self.scale:g}. Lower the learning rate, or use bf16 or fp32."
                )
            else:
                self.scale = max(self.scale / 2, float(minimum))
            return
        self._clean_steps += 1
        # As in DeepSpeed, the first step without overflow does not count.
        windows, rest = divmod(self._clean_steps - 1, settings.loss_scale_window)
        doubles = windows > 0 and rest == 0
        if doubles:
            self.scale *= 2
        if doubles or settings.consecutive_hysteresis:
            self._hysteresis = settings.hysteresis

    def state_dict(self) -> dict[str, float]:
        """Return the state of the scaler as a dict."""
        return {
            "scale": self.scale,
            "hysteresis": self._hysteresis,
            "clean_updates": self._clean_steps,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Load a state returned by `state_dict`."""
        self.scale = float(state["scale"])
        self._hysteresis = int(state["hysteresis"])
        self._clean_steps = int(state["clean_updates"])

"""Loss scaling for float16, with DeepSpeed's rules and config keys."""

from __future__ import annotations

from engine.config import LossScaling

__all__ = ["LossScaler"]


class LossScaler:
    """Scales the loss so that small float16 gradients do not underflow to zero.

    If ``loss_scale`` is above 0, the scale is static and never changes. If it is 0, the scale is
    dynamic and starts at ``2 ** initial_scale_power``. The ``hysteresis``-th overflow and each
    later one halve it, down to ``min_loss_scale``. After ``loss_scale_window + 1`` consecutive
    steps without overflow, it doubles, and it doubles again after every ``loss_scale_window``
    further ones. Doubling also resets the count of overflows.

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

    def update(self, *, overflow: bool) -> None:
        """Adapt the scale after a step whose gradients did or did not overflow.

        Raises:
            FloatingPointError: the gradients overflow at the lowest scale.
        """
        if not self._dynamic:
            return
        settings = self._settings
        if overflow:
            self._clean_steps = 0
            if self._hysteresis > 1:
                self._hysteresis -= 1
            elif self.scale <= settings.min_loss_scale:
                raise FloatingPointError(
                    f"The gradients overflow at the lowest loss scale, {self.scale:g}: training "
                    "diverges. Lower the learning rate, or use bf16 or fp32."
                )
            else:
                self.scale = max(self.scale / 2, float(settings.min_loss_scale))
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
        """Return the scale and the counters that decide its next change."""
        return {
            "scale": self.scale,
            "hysteresis": self._hysteresis,
            "clean_updates": self._clean_steps,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the values that `state_dict` returned."""
        self.scale = float(state["scale"])
        self._hysteresis = int(state["hysteresis"])
        self._clean_steps = int(state["clean_updates"])

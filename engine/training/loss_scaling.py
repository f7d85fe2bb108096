"""Scaling of a float16 run's loss, by the rules and keys of DeepSpeed."""

from __future__ import annotations

from engine.config import LossScaling

__all__ = ["LossScaler"]


class LossScaler:
    """The factor on the loss that keeps small float16 gradients from vanishing.

    Dynamic (``loss_scale`` 0), it starts at ``2 ** initial_scale_power``, is halved by the
    ``hysteresis``-th overflow and each one after it, down to ``min_loss_scale``, and is doubled
    whenever ``loss_scale_window`` more updates in a row than one had no overflow, when the
    hysteresis is full again too. Static, it stays.

    >>> scaler = LossScaler(LossScaling(0, 4, 2, 1, False, 1))
    >>> for overflow in (True, False, False, False):
    ...     scaler.update(overflow=overflow)
    ...     print(scaler.scale)
    8.0
    8.0
    8.0
    16.0

    Source: ``DynamicLossScaler`` of deepspeed/runtime/fp16/loss_scaler.py.
    """

    def __init__(self, settings: LossScaling) -> None:
        self._settings = settings
        self._dynamic = settings.loss_scale == 0
        self.scale = float(settings.loss_scale or 2**settings.initial_scale_power)
        self._hysteresis = settings.hysteresis
        self._clean_updates = 0

    def update(self, *, overflow: bool) -> None:
        """Count an update whose gradients did or did not overflow, and adapt the scale.

        Raises:
            FloatingPointError: the gradients overflow at the lowest scale.
        """
        if not self._dynamic:
            return
        settings = self._settings
        if overflow:
            self._clean_updates = 0
            if self._hysteresis > 1:
                self._hysteresis -= 1
            elif self.scale <= settings.min_loss_scale:
                raise FloatingPointError(
                    f"gradients overflow at the lowest loss scale, {self.scale:g}: the run "
                    "diverges. Lower the learning rate, or use bf16 or fp32."
                )
            else:
                self.scale = max(self.scale / 2, float(settings.min_loss_scale))
            return
        self._clean_updates += 1
        # DeepSpeed's count: the first clean update only opens the window.
        windows, rest = divmod(self._clean_updates - 1, settings.loss_scale_window)
        doubles = windows > 0 and rest == 0
        if doubles:
            self.scale *= 2
        if doubles or settings.consecutive_hysteresis:
            self._hysteresis = settings.hysteresis

    def state_dict(self) -> dict[str, float]:
        """Return the scale and what decides over its next change."""
        return {
            "scale": self.scale,
            "hysteresis": self._hysteresis,
            "clean_updates": self._clean_updates,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.scale = float(state["scale"])
        self._hysteresis = int(state["hysteresis"])
        self._clean_updates = int(state["clean_updates"])

"""Count the elements that an optimizer stores for a parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["count_state_elements", "has_known_states"]

_STATES = {
    "Adadelta": 2,
    "Adagrad": 1,
    "Adam": 2,
    "AdamW": 2,
    "Adamax": 2,
    "ASGD": 1,
    "Lamb": 2,
    "Lion": 1,
    "MuAdam": 2,
    "MuAdamW": 2,
    "Muon": 1,
    "MuSGD": 0,
    "NAdam": 2,
    "RAdam": 2,
    "RMSprop": 1,
    "Rprop": 2,
    "SGD": 0,
}
"""Number of parameter-sized states that each optimizer keeps with its default hyperparameters."""

_OPTIONAL_STATES = {
    "Adam": ("amsgrad",),
    "AdamW": ("amsgrad",),
    "MuAdam": ("amsgrad",),
    "MuAdamW": ("amsgrad",),
    "MuSGD": ("momentum",),
    "RMSprop": ("momentum", "centered"),
    "SGD": ("momentum",),
}
"""Maps optimizers to hyperparameters that each add a parameter-sized state if nonzero or true."""

_UNKNOWN = 2


def has_known_states(optimizer: str) -> bool:
    """Return whether the size of an optimizer's states is known.

    It is unknown for a custom optimizer class.

    >>> has_known_states("AdamW"), has_known_states("my_module:MyOptimizer")
    (True, False)
    """
    return optimizer in _STATES or optimizer == "Adafactor"


def count_state_elements(
    optimizer: str, params: Mapping[str, Any], shape: tuple[int, ...], *, has_adam: bool = False
) -> int:
    """Return the number of tensor elements in an optimizer's state for one parameter.

    The state of a custom optimizer is assumed to be as large as Adam's.

    Args:
        optimizer: canonical name of the optimizer.
        params: hyperparameters of the optimizer, including defaults.
        shape: shape of the parameter.
        has_adam: whether Muon uses Adam for parameters that are not matrices, as in DeepSpeed.
            This argument has no effect for other optimizers.

    >>> count_state_elements("SGD", {"momentum": 0.9}, (4, 5))
    20
    >>> count_state_elements("Adafactor", {}, (4, 5))
    9
    """
    count = math.prod(shape)
    if optimizer == "Adafactor":
        if len(shape) < 2:
            return count
        return count // shape[-1] + count // shape[-2]
    if optimizer == "Muon" and has_adam and len(shape) != 2:
        return 2 * count
    optional = _OPTIONAL_STATES.get(optimizer, ())
    return count * (_STATES.get(optimizer, _UNKNOWN) + sum(bool(params.get(n)) for n in optional))

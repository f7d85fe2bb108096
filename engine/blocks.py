"""The modules of a model that are taken one at a time: gathered, or computed again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["blocks_of"]


def blocks_of(model: nn.Module, wrap: Sequence[str] = ()) -> list[nn.Module]:
    """Return the modules that are gathered one at a time.

    They are of the classes that ``wrap`` names, or else the members of each list of two or more
    modules of one class, which is how transformers keep their layers.

    Raises:
        ValueError: no module is of a class in ``wrap``.

    >>> layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    >>> len(blocks_of(nn.Sequential(layers, nn.Tanh())))
    3
    """
    if wrap:
        found = [module for module in model.modules() if type(module).__name__ in wrap]
        if not found:
            raise ValueError(
                f"`engine.wrap` must name classes of the model's modules, but it has no "
                f"{' or '.join(wrap)}."
            )
        return found
    blocks = []
    for module in model.modules():
        members = list(module.children()) if isinstance(module, nn.ModuleList) else []
        if len(members) > 1 and len({type(member) for member in members}) == 1:
            blocks += [member for member in members if any(True for _ in member.parameters())]
    return blocks

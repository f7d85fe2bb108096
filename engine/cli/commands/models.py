"""Build the model that the command-line option ``--model`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.cli.import_path import current_directory_on_path

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_model"]


def build_model(path: str) -> nn.Module:
    """Build a model by calling an imported function or class, on the meta device if possible.

    Args:
        path: import path, such as "my_module:build_model".

    Raises:
        ValueError: if the import fails, or the function or class does not build a model.
    """
    import torch
    from torch import nn

    from schedules.core.imports import import_attribute

    with current_directory_on_path():
        found: Any = import_attribute(path)
        if not isinstance(found, nn.Module):
            build = found
            try:
                with torch.device("meta"):
                    found = build()
            except Exception:  # noqa: BLE001  # such as a model that reads values of its weights
                found = _call(path, build)
    if not isinstance(found, nn.Module):
        raise ValueError(  # noqa: TRY004  # it is a value of the command line
            "`--model` must name a torch.nn.Module class or a function that returns a module, got "
            f"{path!r}, which returns a value of type {type(found).__name__}."
        )
    return found


def _call(path: str, build: Any) -> Any:
    try:
        return build()
    except Exception as error:
        raise ValueError(
            "`--model` must name a function or class that builds a model when called without "
            f"arguments, got {path!r}, which failed with {type(error).__name__}: {error}."
        ) from error

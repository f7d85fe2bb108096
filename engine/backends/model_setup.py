"""Set up a model for the PyTorch and FSDP2 backends: activation checkpointing and compilation."""

from __future__ import annotations

import torch
from torch import nn

from engine.config.resolve import ModelSettings
from engine.training.activation_checkpointing import checkpoint_activations

__all__ = ["check_compiler", "check_has_data", "set_up_model"]


def check_compiler(compiler: str | None) -> None:
    """Check that ``compiler`` is None or the name of a `torch.compile` backend.

    Raises:
        ValueError: `torch.compile` does not have a backend of this name.
    """
    known = torch.compiler.list_backends(exclude_tags=()) if compiler else ()
    if compiler is not None and compiler not in known:
        raise ValueError(
            f"`engine.compile` must be one of {', '.join(known)}, got {compiler!r}. Choose one of "
            "these compilers, or remove the key."
        )


def check_has_data(model: nn.Module) -> None:
    """Check that no parameter or buffer of a model is on the meta device.

    Raises:
        ValueError: a parameter or buffer is on the meta device.
    """
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if tensor.is_meta:
                raise ValueError(
                    f"`{name}` must not be on the meta device. Build the model on the CPU, or call "
                    '`model.to_empty(device="cpu")` and initialize the parameters.'
                )


def set_up_model(model: nn.Module, settings: ModelSettings) -> None:
    """Enable activation checkpointing and compilation as specified in the config."""
    if settings.activation_checkpointing is not None:
        is_on_host = settings.activation_checkpointing == "host"
        checkpoint_activations(model, settings.wrap_classes, on_host=is_on_host)
    if settings.compile_backend is not None:
        model.compile(backend=settings.compile_backend)

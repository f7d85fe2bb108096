"""Print an estimate of the model states' memory as tables, or describe it as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from engine.config.wording import count_noun
from engine.errors import escape
from engine.memory.alternatives import Alternative
from engine.memory.optimizer_states import has_known_states
from engine.memory.parts import MOMENTS, MemoryEstimate, ParameterSize
from engine.memory.settings import MemorySettings

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["describe_estimate", "format_bytes", "print_estimate"]

_BACKENDS = {"torch": "PyTorch", "deepspeed": "DeepSpeed"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_NOT_COUNTED = (
    "Not counted: activations, the model's buffers, temporary tensors such as the parameters of "
    "the block that a rank gathers, buffers of fixed size, CUDA's own memory and fragmentation."
)


def format_bytes(size: float) -> str:
    """Format a number of bytes with a binary unit.

    >>> format_bytes(14_000_000_000), format_bytes(0)
    ('13.0 GiB', '-')
    """
    if not size:
        return "-"
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.1f} {_UNITS[unit]}" if unit else f"{size:.0f} B"


def print_estimate(
    name: str, model: Sequence[ParameterSize], alternatives: Sequence[Alternative], out: TextIO
) -> None:
    """Print the estimate for the config by component, and the totals for all ZeRO stages.

    Args:
        name: path of the config.
        model: parameters of the model.
        alternatives: estimates for all stages, including that of the config.
        out: stream to print to.
    """
    from rich.console import Console

    chosen = next(each for each in alternatives if each.is_chosen)
    console = Console(file=out, highlight=False, width=None if out.isatty() else 100)
    print(escape(f"{name}: {_describe_run(model, chosen.settings)}"), file=out)
    print(file=out)
    console.print(_build_parts_table(chosen.estimate))
    console.print(_build_stages_table(alternatives))
    for line in _list_notes(chosen.settings):
        console.print(line, markup=False)


def _describe_run(model: Sequence[ParameterSize], settings: MemorySettings) -> str:
    count = sum(each.count for each in model)
    trained = sum(each.count for each in model if each.is_trained)
    size = f"{count:,} parameters" + ("" if trained == count else f", {trained:,} of them trained")
    backend = "FSDP2" if settings.is_sharded else _BACKENDS[settings.backend]
    return (
        f"{size}; {backend}, ZeRO stage {settings.zero_stage}, "
        f"{count_noun(settings.world_size, 'rank')}, {settings.precision}, "
        f"{settings.optimizer.type}"
    )


def _build_parts_table(estimate: MemoryEstimate) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title="Model states per rank", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("on")
    for moment in MOMENTS:
        table.add_column(
            "optimizer step" if moment == "step" else f"{moment} pass", justify="right"
        )
    for part in estimate.parts:
        table.add_row(part.name, part.device, *map(format_bytes, part[2:]))
    table.add_section()
    for device in estimate.devices:
        table.add_row("total", device, *map(format_bytes, estimate.total(device)), style="bold")
    return table


def _build_stages_table(alternatives: Sequence[Alternative]) -> Table:
    from rich import box
    from rich.table import Table

    devices = list(dict.fromkeys(d for each in alternatives for d in each.estimate.devices))
    table = Table(
        title=f"ZeRO stages on {_BACKENDS[alternatives[0].settings.backend]}: most memory per rank",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("stage")
    table.add_column("offloaded to the CPU")
    for device in devices:
        table.add_column(device, justify="right")
    table.add_column("")
    for each in alternatives:
        sizes = [format_bytes(each.estimate.peak(device)) for device in devices]
        table.add_row(
            str(each.settings.zero_stage),
            _describe_offload(each.settings),
            *sizes,
            "this config" if each.is_chosen else "",
            style="bold" if each.is_chosen else "",
        )
    return table


def _describe_offload(settings: MemorySettings) -> str:
    devices = {
        "optimizer": settings.offload_optimizer,
        "parameters": settings.offload_param,
    }
    used = [
        f"{name} (NVMe)" if device == "nvme" else name
        for name, device in devices.items()
        if device != "none"
    ]
    return " and ".join(used) or "-"


def _list_notes(settings: MemorySettings) -> Iterator[str]:
    if not settings.has_optimizer:
        yield "The config has no optimizer, so AdamW is assumed."
    elif not has_known_states(settings.optimizer.type):
        yield f"{settings.optimizer.type} is assumed to store as much as Adam."
    yield _NOT_COUNTED


def describe_estimate(
    model: Sequence[ParameterSize], alternatives: Sequence[Alternative]
) -> dict[str, Any]:
    """Return the estimates as a JSON-compatible dict; all sizes are in bytes per rank."""
    chosen = next(each for each in alternatives if each.is_chosen)
    return {
        **_describe_alternative(chosen),
        "parameters": sum(each.count for each in model),
        "world_size": chosen.settings.world_size,
        "backend": chosen.settings.backend,
        "precision": chosen.settings.precision,
        "optimizer": chosen.settings.optimizer.type,
        "parts": [part._asdict() for part in chosen.estimate.parts],
        "stages": [_describe_alternative(each) for each in alternatives],
        "notes": list(_list_notes(chosen.settings)),
    }


def _describe_alternative(each: Alternative) -> dict[str, Any]:
    return {
        "stage": each.settings.zero_stage,
        "offload_optimizer": each.settings.offload_optimizer,
        "offload_param": each.settings.offload_param,
        "peak": {device: each.estimate.peak(device) for device in each.estimate.devices},
    }

"""Format the estimated memory of the model states as tables or as a JSON-compatible dict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from engine.config.wording import count_noun
from engine.errors import escape
from engine.memory.alternatives import Alternative
from engine.memory.optimizer_states import has_known_states
from engine.memory.parts import MOMENTS, MemoryEstimate, ParameterSize
from engine.memory.settings import MemorySettings

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "EstimateTable",
    "build_tables",
    "describe_estimate",
    "describe_run",
    "format_bytes",
    "list_notes",
    "print_estimate",
]

_BACKENDS = {"torch": "PyTorch", "deepspeed": "DeepSpeed"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_NOT_COUNTED = (
    "Not counted: activations, model buffers, temporary tensors such as the blocks that FSDP2 "
    "gathers in stage 3, fixed-size backend buffers, CUDA's own memory, and fragmentation."
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


class EstimateTable(NamedTuple):
    """A table of memory estimates.

    The first two columns describe an estimate, and the named columns after them contain sizes. A
    last column without a name marks the row that matches the config's ZeRO stage.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    emphasized: Sequence[int]
    """Indices of the rows to emphasize."""


def print_estimate(
    name: str, model: Sequence[ParameterSize], alternatives: Sequence[Alternative], out: TextIO
) -> None:
    """Print the config's memory estimate by component, and the peak memory for each ZeRO stage.

    Args:
        name: path of the config, printed in the first line.
        model: sizes of the model's parameters.
        alternatives: estimates for all ZeRO stages, including the stage of the config.
        out: stream to print to.
    """
    from rich.console import Console

    chosen = next(each for each in alternatives if each.is_chosen)
    console = Console(file=out, highlight=False, width=None if out.isatty() else 100)
    print(escape(f"{name}: {describe_run(model, chosen.settings)}"), file=out)
    print(file=out)
    for table in build_tables(alternatives):
        console.print(_render(table))
    for line in list_notes(chosen.settings):
        console.print(line, markup=False)


def _render(table: EstimateTable) -> Table:
    from rich import box
    from rich.table import Table

    rendered = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(table.columns):
        rendered.add_column(name, justify="right" if index > 1 and name else "left")
    for index, row in enumerate(table.rows):
        rendered.add_row(*row, style="bold" if index in table.emphasized else "")
    return rendered


def describe_run(model: Sequence[ParameterSize], settings: MemorySettings) -> str:
    """Describe the model and the training setup in one line."""
    count = sum(each.count for each in model)
    trained = sum(each.count for each in model if each.is_trained)
    size = f"{count:,} parameters" + ("" if trained == count else f" ({trained:,} trainable)")
    backend = "FSDP2" if settings.is_sharded else _BACKENDS[settings.backend]
    return (
        f"{size}; {backend}, ZeRO stage {settings.zero_stage}, "
        f"{count_noun(settings.world_size, 'rank')}, {settings.precision}, "
        f"{settings.optimizer.type}"
    )


def build_tables(alternatives: Sequence[Alternative]) -> tuple[EstimateTable, EstimateTable]:
    """Return two tables: the config's estimate by component, and a comparison of the ZeRO stages.

    Args:
        alternatives: estimates for all ZeRO stages, including the stage of the config.
    """
    chosen = next(each for each in alternatives if each.is_chosen)
    return _build_parts_table(chosen.estimate), _build_stages_table(alternatives)


def _build_parts_table(estimate: MemoryEstimate) -> EstimateTable:
    moments = ("optimizer step" if moment == "step" else f"{moment} pass" for moment in MOMENTS)
    parts = [(part.name, part.device, *map(format_bytes, part[2:])) for part in estimate.parts]
    totals = [
        ("total", device, *map(format_bytes, estimate.total(device))) for device in estimate.devices
    ]
    return EstimateTable(
        title="Model states per rank",
        columns=("part", "on", *moments),
        rows=parts + totals,
        emphasized=[*range(len(parts), len(parts) + len(totals))],
    )


def _build_stages_table(alternatives: Sequence[Alternative]) -> EstimateTable:
    devices = list(dict.fromkeys(d for each in alternatives for d in each.estimate.devices))
    rows = [
        (
            str(each.settings.zero_stage),
            _describe_offload(each.settings),
            *(format_bytes(each.estimate.peak(device)) for device in devices),
            "this config" if each.is_chosen else "",
        )
        for each in alternatives
    ]
    backend = _BACKENDS[alternatives[0].settings.backend]
    return EstimateTable(
        title=f"ZeRO stages on {backend}: peak memory per rank",
        columns=("stage", "offloaded", *devices, ""),
        rows=rows,
        emphasized=[i for i, each in enumerate(alternatives) if each.is_chosen],
    )


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


def list_notes(settings: MemorySettings) -> Iterator[str]:
    """Yield notes on the assumptions of an estimate and the memory that it excludes."""
    if not settings.has_optimizer:
        yield "The config has no optimizer, so AdamW is assumed."
    elif not has_known_states(settings.optimizer.type):
        yield f"The states of {settings.optimizer.type} are assumed to be as large as Adam's."
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
        "notes": list(list_notes(chosen.settings)),
    }


def _describe_alternative(each: Alternative) -> dict[str, Any]:
    return {
        "stage": each.settings.zero_stage,
        "offload_optimizer": each.settings.offload_optimizer,
        "offload_param": each.settings.offload_param,
        "peak": {device: each.estimate.peak(device) for device in each.estimate.devices},
    }

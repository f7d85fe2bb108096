"""Profile a forward pass: parameters, floating-point operations and time of each module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.training.pass_timer import read_clock

__all__ = ["ModuleProfile", "format_profile", "profile_modules"]


@dataclass
class ModuleProfile:
    """Total cost of a module and its submodules in one forward pass of the model."""

    name: str
    """Name of the module in the model; "" for the model itself."""
    kind: str
    """Name of the module's class."""
    params: int
    flops: int = 0
    """Number of floating-point operations in matrix products, convolutions and attention."""
    seconds: float = 0.0
    calls: int = 0

    @property
    def depth(self) -> int:
        """Nesting depth of the module; 0 for the model."""
        return len(self.name.split(".")) if self.name else 0


@contextlib.contextmanager
def profile_modules(model: nn.Module, device: torch.device) -> Iterator[list[ModuleProfile]]:
    """Profile each module of a model during a forward pass that runs inside this context.

    A compiled model runs uncompiled in this context, because compiled code bypasses module hooks.

    Args:
        model: model to profile.
        device: device to synchronize before and after each module call.

    Yields:
        A list with one profile per module, starting with the model. The profiles are complete when
        the context exits.
    """
    with FlopCounterMode(display=False):
        torch.ones(1, 1).mm(torch.ones(1, 1))  # trigger lazy imports before the timing
    profiles = []
    handles = []
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        for name, module in model.named_modules():
            params = sum(parameter.numel() for parameter in module.parameters())
            profile = ModuleProfile(name, type(module).__name__, params)
            profiles.append(profile)
            handles += _register_hooks(module, profile, counter, device)
        try:
            yield profiles
        finally:
            for handle in handles:
                handle.remove()
    _add_up_containers(profiles)


def _add_up_containers(profiles: Sequence[ModuleProfile]) -> None:
    """Set the cost of each uncalled module, such as a ModuleList, to the sum over its children."""
    for container in reversed(profiles):
        if container.calls == 0 and container.name:
            members = [each for each in profiles if each.name.rpartition(".")[0] == container.name]
            container.flops = sum(each.flops for each in members)
            container.seconds = sum(each.seconds for each in members)


def _register_hooks(
    module: nn.Module, profile: ModuleProfile, counter: FlopCounterMode, device: torch.device
) -> list[Any]:
    starts: list[tuple[int, float]] = []  # one per call, because a module can call itself

    def start(*_: Any) -> None:
        starts.append((counter.get_total_flops(), read_clock(device)))

    def finish(*_: Any) -> None:
        flops, seconds = starts.pop()
        if not starts:
            profile.flops += counter.get_total_flops() - flops
            profile.seconds += read_clock(device) - seconds
            profile.calls += 1

    return [
        module.register_forward_pre_hook(start, prepend=True),
        module.register_forward_hook(finish, always_call=True),
    ]


def format_profile(profiles: Sequence[ModuleProfile], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report about the profiled modules.

    Args:
        profiles: profile of each module, starting with the model.
        settings: the config's ``flops_profiler`` section, with default values filled in.
    """
    model = profiles[0]
    backward = 2 + settings["recompute_fwd_factor"]
    yield f"profile of one micro-batch after {settings['profile_step']:,} steps, on rank 0"
    yield f"parameters     {_format_number(model.params).strip()}"
    yield (
        f"forward pass   {_format_number(model.flops)}FLOPs, {_format_number(model.seconds)}s, "
        f"{_format_number(model.flops / max(model.seconds, 1e-9))}FLOP/s"
    )
    yield f"backward pass  {_format_number(backward * model.flops)}FLOPs ({backward:g} x forward)"
    yield "FLOPs of matrix products, convolutions and attention; a multiply-add counts as 2."
    yield "Times include the overhead of counting FLOPs, which is significant for small modules."
    yield from _format_depths(profiles, settings["module_depth"], settings["top_modules"])
    if settings["detailed"]:
        yield "\nmodule: parameters, FLOPs, time"
        for profile in profiles:
            yield f"{'  ' * profile.depth}{_format_module(profile, model)}"


def _format_depths(profiles: Sequence[ModuleProfile], last_depth: int, count: int) -> Iterator[str]:
    """Yield lines that rank module classes at each depth by parameters, FLOPs and time.

    Each ranking lists at most ``count`` classes. Depths greater than ``last_depth`` are omitted,
    unless ``last_depth`` is -1.
    """
    deepest = max(profile.depth for profile in profiles)
    for depth in range(min(last_depth, deepest) + 1 if last_depth >= 0 else deepest + 1):
        yield f"\ntop {count} classes at depth {depth}"
        here = [profile for profile in profiles if profile.depth == depth]
        for metric, unit in (("params", ""), ("flops", "FLOPs"), ("seconds", "s")):
            sums: dict[str, float] = {}
            for profile in here:
                sums[profile.kind] = sums.get(profile.kind, 0) + getattr(profile, metric)
            top = sorted(sums.items(), key=lambda item: -item[1])[:count]
            listed = (f"{kind} {_format_number(total)}{unit}".strip() for kind, total in top)
            yield f"  {metric:<8} {', '.join(listed)}"


def _format_module(profile: ModuleProfile, model: ModuleProfile) -> str:
    parts = [
        f"{_format_number(value)}{unit}".strip() + f" ({value / total if total else 0:.1%})"
        for value, total, unit in (
            (profile.params, model.params, ""),
            (profile.flops, model.flops, "FLOPs"),
            (profile.seconds, model.seconds, "s"),
        )
    ]
    name = profile.name.rpartition(".")[2]
    title = f"({name}) {profile.kind}" if name else profile.kind
    return f"{title}: {', '.join(parts)}"


def _format_number(value: float) -> str:
    """Format a number with an SI prefix, so that a unit can be appended.

    >>> _format_number(1234567), _format_number(0.00012), _format_number(0)
    ('1.23 M', '120 µ', '0 ')
    """
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    if value == 0 or value >= 1:
        return f"{value:.3g} "
    return f"{value * 1e3:.3g} m" if value >= 1e-3 else f"{value * 1e6:.3g} µ"

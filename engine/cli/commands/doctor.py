"""``onecycle doctor``: report which features work on this machine, and why the others do not."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple, TextIO

from engine.cli.commands.arguments import add_examples
from engine.config.versions import get_installed_version
from engine.display.terminal import format_rows, get_width
from engine.distributed.environment import OK
from engine.launch.probe import PACKAGES
from schedules.core.extras import EXTRAS

__all__ = ["add_arguments", "run"]

_FEATURES = {
    "matplotlib": "plots as images",
    "plotext": "plots in the terminal",
    "tensorboard": "TensorBoard",
}
"""Maps each optional package to the feature that needs it."""


class _Finding(NamedTuple):
    group: str
    name: str
    works: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle doctor`` to a parser."""
    parser.description = (
        "Report which features work on this machine: training on CPUs and GPUs, DeepSpeed, plots, "
        "monitors, and launching on several hosts. If a feature does not work, print the reason."
    )
    parser.add_argument(
        "--ops", action="store_true", help="also list each DeepSpeed op and whether it can be built"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_examples(parser, "onecycle doctor", "onecycle doctor --json")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Check all features and print the results. The exit status is always 0."""
    checks: tuple[Callable[[], Iterator[_Finding]], ...] = (
        _check_versions,
        _check_training,
        lambda: _check_deepspeed(list_ops=args.ops),
        _check_packages,
        _check_tools,
    )
    findings = [finding for check in checks for finding in check()]
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1), file=out)
        return OK
    size = max(len(finding.name) for finding in findings)
    for index, (group, found) in enumerate(itertools.groupby(findings, lambda each: each.group)):
        print(f"\n{group}:" if index else f"{group}:", file=out)
        rows = [
            ("yes" if each.works else "no ", each.name.ljust(size), each.detail) for each in found
        ]
        for line in format_rows(rows, get_width(out), indent=2):
            print(line, file=out)
    return OK


def _check_versions() -> Iterator[_Finding]:
    yield _Finding("Versions", "python", True, platform.python_version())
    for package in PACKAGES:
        found = get_installed_version(package)
        detail = found or f"not installed: pip install {package}"
        yield _Finding("Versions", package, found is not None, detail)


def _check_training() -> Iterator[_Finding]:
    group = "Training"
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        yield _Finding(group, "PyTorch", False, str(error))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield _Finding(group, "on the CPU", True, f"{cores} cores")
    count = torch.cuda.device_count()
    if count:
        detail = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    elif torch.version.cuda:
        detail = "torch finds no GPU"
    else:
        detail = f"torch {torch.__version__} is a CPU-only build"
    yield _Finding(group, "on GPUs", count > 0, detail)
    gloo = dist.is_available() and dist.is_gloo_available()
    detail = "with Gloo, including FSDP2" if gloo else "this build of torch lacks Gloo"
    yield _Finding(group, "several processes on CPUs", gloo, detail)
    nccl = dist.is_available() and dist.is_nccl_available()
    detail = "with NCCL, including FSDP2" if nccl else "this build of torch lacks NCCL"
    yield _Finding(group, "several processes on GPUs", nccl, detail)
    compiler = _find_compiler()
    detail = f"with {compiler}" if compiler else "no C++ compiler (Debian: g++)"
    yield _Finding(group, "compiled models", compiler is not None, detail)


def _find_compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def _check_deepspeed(*, list_ops: bool) -> Iterator[_Finding]:
    group = "DeepSpeed"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # hide warnings that the import prints
            import deepspeed
            from deepspeed.ops.op_builder.all_ops import ALL_OPS
    except ImportError as error:
        yield _Finding(group, "backend", False, str(error))
        return
    yield _Finding(group, "backend", True, f"DeepSpeed {deepspeed.__version__}")
    ninja = shutil.which("ninja") is not None or get_installed_version("ninja") is not None
    why = "" if _find_compiler() else "no C++ compiler (Debian: g++)"
    why = why or ("" if ninja else "ninja is not installed: pip install ninja")
    yield _Finding(group, "building its ops", not why, why or "on first use")
    states = {name: _describe_op(builder) for name, builder in sorted(ALL_OPS.items())}
    for feature, op in (("CPU Adam, for offloading", "cpu_adam"), ("NVMe offload", "async_io")):
        if op in states:
            works, detail = states[op]
            hint = "" if works else " (Debian: libaio-dev)" if op == "async_io" else ""
            yield _Finding(group, feature, works, f"{op}: {detail}{hint}")
    if list_ops:
        for name, (works, detail) in states.items():
            yield _Finding(group, f"op {name}", works, detail)
    from engine.backends.build_locks import find_build_locks  # imports torch

    for lock in find_build_locks():
        yield _Finding(group, f"build of {lock.path.parent.name}", False, str(lock))


def _describe_op(builder: object) -> tuple[bool, str]:
    """Return whether DeepSpeed can build an op, and a message that explains the result."""
    try:
        fits = bool(builder.is_compatible(verbose=False))  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001  # different ops raise different exceptions
        first_line = str(error).partition("\n")[0]
        return False, f"{type(error).__name__}: {first_line or 'no message'}"
    return fits, "can be built" if fits else "not supported on this machine"


def _check_packages() -> Iterator[_Finding]:
    group = "Plots and monitors"
    for package, feature in _FEATURES.items():
        found = get_installed_version(package)
        missing = f"not installed: pip install {package} (part of the extra `{EXTRAS[package]}`)"
        detail = f"{package} {found}" if found else missing
        yield _Finding(group, feature, found is not None, detail)
    found = get_installed_version("wandb")
    detail = f"wandb {found}" if found else "not installed: pip install wandb"
    yield _Finding(group, "Weights & Biases", found is not None, detail)


def _check_tools() -> Iterator[_Finding]:
    for feature, tool, needed in (
        ("several hosts", "ssh", "`onecycle launch --hostfile`; Debian: openssh-client"),
        ("Slurm jobs", "sbatch", "`onecycle launch --slurm`"),
        ("Slurm jobs on several nodes", "srun", "the job script"),
    ):
        path = shutil.which(tool)
        detail = path or f"{tool} is not installed (required by {needed})"
        yield _Finding("Launching", feature, path is not None, detail)

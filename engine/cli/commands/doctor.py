"""``onecycle doctor``: report which features work on this machine, and why the others do not."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple, TextIO

from engine.config.versions import get_installed_version
from engine.distributed.environment import OK
from engine.launch.probe import PACKAGES

__all__ = ["add_arguments", "run"]


class _Finding(NamedTuple):
    name: str
    works: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle doctor`` to a parser."""
    parser.description = (
        "Report which features work on this machine: torch and its devices, process groups, "
        "DeepSpeed and its ops, ssh and Slurm. Print the reason for each feature that does not "
        "work."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Check all features and print the results. The exit status is always 0."""
    checks: tuple[Callable[[], Iterator[_Finding]], ...] = (
        _check_packages,
        _check_torch,
        _check_deepspeed,
        _check_tools,
    )
    findings = [finding for check in checks for finding in check()]
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1), file=out)
        return OK
    width = max(len(finding.name) for finding in findings)
    for name, works, detail in findings:
        print(f"{'yes' if works else 'no ':3}  {name:{width}}  {detail}", file=out)
    return OK


def _check_packages() -> Iterator[_Finding]:
    yield _Finding("python", True, platform.python_version())
    for package in (*PACKAGES, "safetensors", "tensorboard", "wandb"):
        found = get_installed_version(package)
        yield _Finding(package, found is not None, found or f"not installed: pip install {package}")


def _check_torch() -> Iterator[_Finding]:
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        yield _Finding("torch works", False, str(error))
        return
    count = torch.cuda.device_count()
    if count:
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        yield _Finding("CUDA", True, names)
    else:
        built = torch.version.cuda
        why = "torch finds no GPU" if built else f"torch {torch.__version__} is a CPU-only build"
        yield _Finding("CUDA", False, why)
    if not dist.is_available():
        yield _Finding("process groups", False, "this build of torch lacks torch.distributed")
        return
    yield _Finding("gloo", dist.is_gloo_available(), "process groups on CPU")
    nccl = dist.is_nccl_available()
    detail = "process groups on GPUs" if nccl else "this build of torch lacks NCCL"
    yield _Finding("nccl", nccl, detail)


def _check_deepspeed() -> Iterator[_Finding]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # hide warnings that the import prints
            from deepspeed.ops.op_builder.all_ops import ALL_OPS
    except ImportError as error:
        yield _Finding("DeepSpeed's ops", False, str(error))
        return
    compiler = shutil.which("g++") or shutil.which("c++")
    why = "" if compiler else "no C++ compiler (Debian: g++)"
    ninja = shutil.which("ninja") is not None or get_installed_version("ninja") is not None
    why = why or ("" if ninja else "ninja is not installed: pip install ninja")
    yield _Finding("DeepSpeed can build", not why, why or f"with {compiler}")
    for name, builder in sorted(ALL_OPS.items()):
        try:
            fits = builder.is_compatible(verbose=False)
            detail = "can be built" if fits else "not supported on this machine"
        except Exception as error:  # noqa: BLE001  # different ops raise different exceptions
            fits, detail = False, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        yield _Finding(f"DeepSpeed's {name}", bool(fits), detail)
    from engine.backends.build_locks import find_build_locks  # imports torch

    for lock in find_build_locks():
        yield _Finding(f"build of {lock.path.parent.name}", False, str(lock))


def _check_tools() -> Iterator[_Finding]:
    for tool, needed in (
        ("ssh", "`onecycle launch --hostfile`; Debian: openssh-client"),
        ("sbatch", "`onecycle launch --slurm`"),
        ("srun", "Slurm jobs on several nodes"),
    ):
        path = shutil.which(tool)
        yield _Finding(tool, path is not None, path or f"not installed; needed for {needed}")

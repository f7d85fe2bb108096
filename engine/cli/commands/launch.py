"""``onecycle launch``: start a script on one or more hosts, and stop all ranks if one fails."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from engine.cli.commands.arguments import add_examples
from engine.cli.commands.launch_options import EPILOG, EXAMPLES, add_options
from engine.display.terminal import get_width, wrap
from engine.distributed.environment import INVALID, OK, SET, UNREACHABLE, USAGE
from engine.errors import LaunchError
from engine.launch.hosts import (
    Host,
    limit_hosts,
    parse_nnodes,
    parse_nproc,
    read_hostfile,
    select_hosts,
)
from engine.launch.plan import HostFacts, build_plan, is_secret
from engine.launch.preflight import check_hosts
from engine.launch.probe import find_free_port
from engine.launch.request import LaunchRequest, bind_to_cores, find_config, read_variables
from engine.launch.runner import report_outcome
from engine.launch.runner import run as run_plan
from engine.launch.slurm import (
    build_sbatch,
    count_gpus,
    is_in_allocation,
    run_in_allocation,
    submit,
)
from engine.launch.torchrun import LOCAL_RANK_ARGUMENT

__all__ = ["add_arguments", "run"]

_NEEDS_HOSTFILE = "requires `--hostfile`. Launch over ssh with `--hostfile`, or remove this option."
_CHOSEN_BY_SLURM = (
    "has no effect in a Slurm job, where Slurm chooses the hosts. Remove this option."
)
# For each option: the kinds of launch that support it, and the error message for other kinds.
_SUPPORTED_BY: dict[str, tuple[set[str], str]] = {
    "include": ({"ssh", "local"}, _CHOSEN_BY_SLURM),
    "exclude": ({"ssh", "local"}, _CHOSEN_BY_SLURM),
    "ssh_opt": ({"ssh"}, _NEEDS_HOSTFILE),
    "ssh_port": ({"ssh"}, _NEEDS_HOSTFILE),
    "master_addr": ({"ssh", "local"}, _CHOSEN_BY_SLURM),
    "standalone": (
        {"local"},
        "starts all ranks on this machine. Remove this option to use a hostfile or Slurm.",
    ),
    "rejoin": ({"ssh"}, _NEEDS_HOSTFILE),
    "slurm_opt": (
        {"slurm"},
        "requires `--slurm` or `--write-sbatch`. Add one of them, or remove this option.",
    ),
    "console": (
        {"ssh", "local"},
        "has no effect in a Slurm job, because its log contains all output. Remove this option.",
    ),
    "pass_env": (
        {"ssh", "local"},
        (
            "has no effect in a Slurm job, because the job receives all environment variables. "
            "Remove this option."
        ),
    ),
    "no_preflight": (
        {"ssh", "local"},
        "has no effect in a Slurm job, because its hosts are not checked. Remove this option.",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle launch`` to a parser."""
    parser.description = (
        "Start a script on this machine, on the hosts of a hostfile over ssh, or as a Slurm job. "
        "torchrun provides ranks, rendezvous and restarts. If one rank fails, all others stop."
    )
    parser.epilog = EPILOG
    add_examples(parser, *EXAMPLES)
    add_options(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Validate the config, check the hosts, launch the script, and return the exit status."""
    script = tuple(args.script[1:] if args.script[:1] == ["--"] else args.script)
    _check_script(args, script)
    _check_options(args)
    config = args.config or find_config(script, args.cwd)
    request = _build_request(args, script)
    ranks = sum(host.size for host in request.hosts)
    if config and not _is_valid(config, args.set, ranks, out):
        return INVALID
    if _is_slurm(args):
        return _launch_by_slurm(args, request, out)
    facts: dict[str, HostFacts] = {}
    if not (args.dry_run or args.no_preflight):
        found = _run_preflight(request, config, out)
        if found is None:
            return UNREACHABLE
        facts = found
    plan = build_plan(request, facts, os.environ)
    if args.dry_run:
        print(plan.describe(as_json=args.json), file=out)
        return OK
    return report_outcome(run_plan(plan, args.console, out))


def _check_script(args: argparse.Namespace, script: tuple[str, ...]) -> None:
    if not script:
        raise LaunchError("No script was given. Usage: `onecycle launch --nproc 2 train.py ARGS`.")
    if not args.module and not args.no_python and not Path(args.cwd, script[0]).is_file():
        raise FileNotFoundError(2, "script not found", script[0])
    if sys.platform != "linux":
        raise LaunchError(
            "`onecycle launch` supports only Linux. On other systems, start the script with "
            "torchrun."
        )


def _is_slurm(args: argparse.Namespace) -> bool:
    return bool(args.slurm or args.write_sbatch)


def _check_options(args: argparse.Namespace) -> None:
    """Check the command-line options.

    Raises:
        LaunchError: if an option has an invalid value, or is not supported by this kind of launch
            (local, ssh or Slurm).
    """
    if not 0 <= args.port < 2**16:
        raise LaunchError(
            f"`--port` must be between 0 and 65535, got {args.port}. To use any free port, remove "
            "the option."
        )
    if args.hostfile and _is_slurm(args):
        raise LaunchError(
            "`--hostfile` cannot be combined with `--slurm` or `--write-sbatch`. Remove "
            "`--hostfile`, or remove the Slurm options."
        )
    kind = "slurm" if _is_slurm(args) else "ssh" if args.hostfile else "local"
    for option, (supported, error) in _SUPPORTED_BY.items():
        is_default = getattr(args, option) in (None, False, 0, [], "", "rank0")
        if kind not in supported and not is_default:
            raise LaunchError(f"`--{option.replace('_', '-')}` {error}")
    if args.json and not args.dry_run:
        raise LaunchError("`--json` requires `--dry-run`. Add `--dry-run`, or remove `--json`.")


def _build_request(args: argparse.Namespace, script: tuple[str, ...]) -> LaunchRequest:
    min_nodes, nnodes = parse_nnodes(args.nnodes)
    is_local = args.hostfile is None
    hosts = _build_hosts(args, nnodes)
    if args.pass_local_rank:
        script = (script[0], LOCAL_RANK_ARGUMENT, *script[1:])
    if args.bind_cores:
        script = bind_to_cores(
            script, args.python, is_module=args.module, is_command=args.no_python
        )
    return LaunchRequest(
        script=script,
        hosts=hosts,
        is_local=is_local,
        is_command=args.no_python or args.bind_cores,
        is_module=args.module and not (args.no_python or args.bind_cores),
        min_nodes=min_nodes if _is_slurm(args) or not is_local else None,
        max_restarts=args.max_restarts,
        timeout=args.timeout,
        rendezvous_timeout=args.rdzv_timeout,
        store=(socket.gethostname(), _find_port(args.port)) if args.rejoin else None,
        address=args.master_addr,
        port=args.port,
        interface=args.iface,
        env=read_variables(args.env_file, args.env) | _build_set_variable(args.set),
        pass_env=tuple(args.pass_env),
        cwd=str(Path(args.cwd).resolve()),
        python=args.python,
        log_dir=args.log_dir and str(Path(args.log_dir).resolve()),
        grace=args.grace,
        ssh_options=(*args.ssh_opt, *([f"Port={args.ssh_port}"] if args.ssh_port else [])),
        job=f"onecycle-{os.getpid()}-{int(time.time())}",
    )


def _build_set_variable(assignments: Sequence[str]) -> dict[str, str]:
    """Return a dict with the environment variable that passes `--set` options to the ranks."""
    from engine.config.overrides import parse_assignments

    parse_assignments(assignments)  # raises an error here instead of on each rank
    return {SET: json.dumps(assignments)} if assignments else {}


def _build_hosts(args: argparse.Namespace, nnodes: int | None) -> tuple[Host, ...]:
    if args.hostfile:
        listed = read_hostfile(args.hostfile, args.nproc)
        return limit_hosts(select_hosts(listed, args.include, args.exclude), nnodes, args.nproc)
    count = nnodes or 1
    if count > 1 and not _is_slurm(args):
        raise LaunchError(
            "Without `--hostfile`, `--slurm` or `--write-sbatch`, `--nnodes` must be 1, got "
            f"{count}. Add one of these options. Alternatively, start the script with srun, or "
            "start torchrun on every host."
        )
    if args.include or args.exclude:
        here = Host("localhost", tuple(range(parse_nproc("auto"))))
        return limit_hosts(select_hosts([here], args.include, args.exclude), None, args.nproc)
    gpus = count_gpus(_read_slurm_options(args)) if _is_slurm(args) else None
    # The GPUs of a job are those of its nodes, not those of the host that submits it.
    size = gpus if gpus and args.nproc in {"auto", "gpu"} else parse_nproc(args.nproc)
    slots = tuple(range(size))
    if not _is_slurm(args):
        return (Host("localhost", slots),)
    return tuple(Host(f"node{index}", slots) for index in range(count))


def _find_port(port: int) -> int:
    found = find_free_port(port)
    if found is None:
        raise LaunchError(
            f"Port {port} is already in use on this host. Choose another port with `--port`."
        )
    return found


def _is_valid(config: str, assignments: Sequence[str], world_size: int, out: TextIO) -> bool:
    from engine.config import load_document
    from engine.config.overrides import apply_assignments
    from engine.config.validate import check
    from engine.display.problem_reports import write_error
    from engine.errors import ConfigError

    document, _ = apply_assignments(load_document(config), assignments)
    errors = [each for each in check(document, world_size) if each.severity == "error"]
    if errors:
        write_error(ConfigError(config, errors), out)
    return not errors


def _run_preflight(
    request: LaunchRequest, config: str | None, out: TextIO
) -> dict[str, HostFacts] | None:
    """Run the preflight checks on all hosts, and print the problems found.

    Returns:
        Dict that maps each host name to the host's network settings; None if a check failed.
    """
    checks = check_hosts(request, config and str(Path(config).resolve()))
    failed = [check for check in checks if check.problem]
    for check in failed:
        print(*wrap(f"{check.host}: {check.problem}", get_width(out)), sep="\n", file=out)
    if failed:
        summary = f"{len(failed)} of {len(checks)} hosts cannot be used; nothing was started"
        print(summary, file=out)
        return None
    return {check.host: check.facts for check in checks if check.facts}


def _read_slurm_options(args: argparse.Namespace) -> dict[str, str]:
    return dict(option.partition("=")[::2] for option in args.slurm_opt)


def _launch_by_slurm(args: argparse.Namespace, request: LaunchRequest, out: TextIO) -> int:
    options = _read_slurm_options(args)
    if args.dry_run:
        script = build_sbatch(request, options, hide_secrets=True)
        print(json.dumps({"sbatch": script}) if args.json else script, file=out)
        return OK
    script = build_sbatch(request, options)
    if args.write_sbatch:
        _write_private_file(args.write_sbatch, script)
        command = shlex.join(["sbatch", str(args.write_sbatch)])
        print(f"Wrote the job script. Submit it with `{command}`.", file=out)
        _print_gpu_hint(options, out)
        secrets = [name for name in request.env if is_secret(name)]
        if secrets:
            print(
                f"The job script contains secret values ({', '.join(secrets)}). Only you have "
                "permission to read the script.",
                file=out,
            )
        return OK
    if is_in_allocation():
        out.flush()
        run_in_allocation(script, len(request.hosts), options)
    accepted, printed = submit(script)
    print(printed, file=out)
    _print_gpu_hint(options, out)
    return OK if accepted else USAGE


def _print_gpu_hint(options: Mapping[str, str], out: TextIO) -> None:
    if count_gpus(options) == 0:
        hint = "The job requests no GPUs. To request them, add `--slurm-opt gpus-per-node=N`."
        print(hint, file=out)


def _write_private_file(path: Path, text: str) -> None:
    """Write text, which may contain secrets, to a file that only its owner can read.

    A regular file that already exists is overwritten and made private.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123  # a descriptor
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)
        file.write(text)

"""``onecycle launch``: start a script on one or more hosts, and stop all ranks if one fails."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

from engine.cli.commands.arguments import parse_positive_int
from engine.distributed.environment import INVALID, OK, UNREACHABLE, USAGE
from engine.errors import LaunchError
from engine.launch.hosts import (
    Host,
    limit_hosts,
    parse_nnodes,
    parse_nproc,
    read_hostfile,
    select_hosts,
)
from engine.launch.plan import HostFacts, build_plan
from engine.launch.preflight import check_hosts
from engine.launch.probe import find_free_port
from engine.launch.request import LaunchRequest, bind_to_cores, find_config, read_variables
from engine.launch.runner import report_outcome
from engine.launch.runner import run as run_plan
from engine.launch.slurm import build_sbatch, is_in_allocation, run_in_allocation, submit

__all__ = ["add_arguments", "run"]

_NEEDS_HOSTFILE = "requires `--hostfile`. Add it, or remove this option."
# For each option: the kinds of launch that support it, and the error message for other kinds.
_SUPPORTED_BY: dict[str, tuple[set[str], str]] = {
    "include": ({"ssh"}, _NEEDS_HOSTFILE),
    "exclude": ({"ssh"}, _NEEDS_HOSTFILE),
    "ssh_opt": ({"ssh"}, _NEEDS_HOSTFILE),
    "port": ({"ssh"}, "requires `--hostfile`. Remove it; a free port is chosen automatically."),
    "rejoin": ({"ssh"}, "requires `--hostfile`. Remove it; Slurm requeues a job that lost a node."),
    "slurm_opt": (
        {"slurm"},
        "requires `--slurm` or `--write-sbatch`. Add one of them, or remove this option.",
    ),
    "console": (
        {"ssh", "local"},
        "has no effect in a Slurm job, whose log contains the output of all ranks. Remove it.",
    ),
    "pass_env": (
        {"ssh", "local"},
        "has no effect in a Slurm job, which inherits the whole environment of sbatch. Remove it.",
    ),
    "no_preflight": (
        {"ssh", "local"},
        "has no effect in a Slurm job, whose hosts are unknown before it starts. Remove it.",
    ),
}

_EPILOG = """\
Times S are in seconds.

exit status: 0 all ranks succeeded; the status of the first failed rank (128 + n: signal n);
128 + n: the launcher received signal n; 1 the config is invalid; 2 wrong usage; 69 a host is
unreachable or has different package versions; 75 a host was lost, or the run saved and exited
after a signal; 124 the rendezvous timed out

examples:
  onecycle launch --nproc 2 train.py --epochs 3
  onecycle launch --hostfile hostfile --include node0@node1:0,1 train.py
  onecycle launch --hostfile hostfile --dry-run train.py
  onecycle launch --hostfile hostfile --nnodes 1:2 --max-restarts 3 train.py
  onecycle launch --hostfile hostfile --max-restarts 3 --rejoin train.py
  onecycle launch --nnodes 2 --nproc 8 --write-sbatch job.sbatch train.py
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle launch`` to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Start a script on this machine, on the hosts of a hostfile over ssh, or as a Slurm job.\n"
        "torchrun provides ranks, rendezvous and restarts. If one rank fails, all others stop."
    )
    parser.epilog = _EPILOG
    _add_host_arguments(parser.add_argument_group("hosts"))
    _add_rank_arguments(parser.add_argument_group("ranks"))
    _add_launcher_arguments(parser.add_argument_group("launcher"))
    script = parser.add_argument_group("script")
    script.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module name")
    script.add_argument(
        "--no-python", action="store_true", help="SCRIPT is a command, not a Python file"
    )
    script.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS")


def _add_host_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--hostfile", type=Path, metavar="F", help="hostfile: one line `host slots=N` per host")
    include_help = "hosts and slots to use, for example node0@node1:0,2-3"
    add("--include", default="", metavar="H", help=include_help)
    exclude_help = "hosts and slots to exclude, in the format of --include"
    add("--exclude", default="", metavar="H", help=exclude_help)
    add("--nproc", default="auto", metavar="N", help="processes per host (default: one per GPU)")
    nnodes_help = "number of hosts; with MIN:MAX, the job continues with at least MIN hosts"
    add("--nnodes", metavar="N|MIN:MAX", help=nnodes_help)
    slurm_help = "submit a Slurm job; inside an allocation, run in the allocation"
    add("--slurm", action="store_true", help=slurm_help)
    sbatch_help = "write the Slurm job script to a file without submitting it"
    add("--write-sbatch", type=Path, metavar="F", help=sbatch_help)
    option_help = "#SBATCH option, such as time=30; can be repeated"
    add("--slurm-opt", action="append", default=[], metavar="K=V", help=option_help)
    add(
        "--ssh-opt",
        action="append",
        default=[],
        metavar="O",
        help="ssh option, such as ProxyJump=gate; can be repeated",
    )


def _add_rank_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--env",
        action="append",
        default=[],
        metavar="K=V",
        help="environment variable to set for every rank; can be repeated",
    )
    file_help = "file of environment variables: one K=V per line; # starts a comment"
    add("--env-file", type=Path, metavar="F", help=file_help)
    pattern_help = "variables to forward, such as WANDB_* (NCCL_*, HF_* and others always are)"
    add("--pass-env", action="append", default=[], metavar="PATTERN", help=pattern_help)
    add("--cwd", default=".", metavar="D", help="working directory on every host")
    python_help = "interpreter on every host (default: this one)"
    add("--python", default=sys.executable, metavar="EXE", help=python_help)
    add("--bind-cores", action="store_true", help="bind each rank to its own CPU cores")
    add("--log-dir", metavar="D", help="directory for the log files, one per rank")
    restarts_help = "maximum number of restarts (default: 0)"
    add("--max-restarts", type=int, default=0, metavar="R", help=restarts_help)
    timeout_help = "timeout of collectives (default: 600)"
    add("--timeout", type=parse_positive_int, default=600, metavar="S", help=timeout_help)
    grace_help = "time for ranks to save before they are killed (default: 30)"
    add("--grace", type=parse_positive_int, default=30, metavar="S", help=grace_help)


def _add_launcher_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--config",
        metavar="F",
        help="config to validate before launch (default: the .json file in ARGS)",
    )
    rejoin_help = "reconnect to a lost host for up to --rdzv-timeout seconds"
    add("--rejoin", action="store_true", help=rejoin_help)
    rendezvous_help = "timeout of the rendezvous (default: 300)"
    add("--rdzv-timeout", type=parse_positive_int, default=300, metavar="S", help=rendezvous_help)
    port_help = "port of the rendezvous (default: a free port)"
    add("--port", type=int, default=0, metavar="P", help=port_help)
    iface_help = "network interface for Gloo and NCCL (default: the interface that ssh uses)"
    add("--iface", metavar="NAME", help=iface_help)
    choices = ["all", "rank0", "none"]
    console_help = (
        "ranks whose output is printed (default: rank0, and the last lines of a failed rank)"
    )
    add("--console", choices=choices, default="rank0", help=console_help)
    dry_run_help = "print the launch plan and exit, without connecting to any host"
    add("--dry-run", action="store_true", help=dry_run_help)
    add("--json", action="store_true", help="with --dry-run: print the launch plan as JSON")
    add("--no-preflight", action="store_true", help="skip the preflight checks of the hosts")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Validate the config, check the hosts, and launch the script."""
    script = tuple(args.script[1:] if args.script[:1] == ["--"] else args.script)
    _check_script(args, script)
    _check_options(args)
    config = args.config or find_config(script, args.cwd)
    request = _build_request(args, script)
    if config and not _is_valid(config, sum(host.size for host in request.hosts), out):
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
        LaunchError: an option has an invalid value, or is not supported by this kind of launch
            (local, ssh or Slurm).
    """
    if not 0 <= args.port < 2**16:
        raise LaunchError(f"`--port` must be between 0 and 65535, got {args.port}.")
    if args.hostfile and _is_slurm(args):
        raise LaunchError(
            "`--hostfile` cannot be combined with `--slurm` or `--write-sbatch`. Remove one of "
            "the options."
        )
    kind = "slurm" if _is_slurm(args) else "ssh" if args.hostfile else "local"
    for option, (supported, error) in _SUPPORTED_BY.items():
        is_default = getattr(args, option) in (None, False, 0, [], "", "rank0")
        if kind not in supported and not is_default:
            raise LaunchError(f"`--{option.replace('_', '-')}` {error}")
    if args.json and not args.dry_run:
        raise LaunchError("`--json` requires `--dry-run`. Add it, or remove `--json`.")


def _build_request(args: argparse.Namespace, script: tuple[str, ...]) -> LaunchRequest:
    min_nodes, nnodes = parse_nnodes(args.nnodes)
    is_local = args.hostfile is None
    hosts = _build_hosts(args, nnodes)
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
        port=args.port,
        interface=args.iface,
        env=read_variables(args.env_file, args.env),
        pass_env=tuple(args.pass_env),
        cwd=str(Path(args.cwd).resolve()),
        python=args.python,
        log_dir=args.log_dir and str(Path(args.log_dir).resolve()),
        grace=args.grace,
        ssh_options=tuple(args.ssh_opt),
        job=f"onecycle-{os.getpid()}-{int(time.time())}",
    )


def _build_hosts(args: argparse.Namespace, nnodes: int | None) -> tuple[Host, ...]:
    if args.hostfile:
        hosts = select_hosts(read_hostfile(args.hostfile), args.include, args.exclude)
        return limit_hosts(hosts, nnodes, args.nproc)
    count = nnodes or 1
    if count > 1 and not _is_slurm(args):
        raise LaunchError("`--nnodes` > 1 requires `--hostfile` or `--slurm`. Add one of them.")
    slots = tuple(range(parse_nproc(args.nproc)))
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


def _is_valid(config: str, world_size: int, out: TextIO) -> bool:
    from engine.config import validate
    from engine.display.problem_reports import write_error
    from engine.errors import ConfigError

    errors = [each for each in validate(config, world_size=world_size) if each.severity == "error"]
    if errors:
        write_error(ConfigError(config, errors), out)
    return not errors


def _run_preflight(
    request: LaunchRequest, config: str | None, out: TextIO
) -> dict[str, HostFacts] | None:
    """Run the preflight checks on all hosts.

    Returns:
        Network settings of each host, by host name. If a check failed, the problem is printed and
        None is returned.
    """
    checks = check_hosts(request, config and str(Path(config).resolve()))
    failed = [check for check in checks if check.problem]
    for check in failed:
        print(f"{check.host}: {check.problem}", file=out)
    if failed:
        summary = f"{len(failed)} of {len(checks)} hosts cannot be used; nothing was started"
        print(summary, file=out)
        return None
    return {check.host: check.facts for check in checks if check.facts}


def _launch_by_slurm(args: argparse.Namespace, request: LaunchRequest, out: TextIO) -> int:
    options = dict(option.partition("=")[::2] for option in args.slurm_opt)
    script = build_sbatch(request, options)
    if args.write_sbatch:
        args.write_sbatch.write_text(script, encoding="utf-8")
        print(f"Wrote the job script. Submit it with `sbatch {args.write_sbatch}`.", file=out)
        return OK
    if args.dry_run:
        print(json.dumps({"sbatch": script}) if args.json else script, file=out)
        return OK
    if is_in_allocation():
        out.flush()
        run_in_allocation(script, len(request.hosts), options)
    accepted, printed = submit(script)
    print(printed, file=out)
    return OK if accepted else USAGE

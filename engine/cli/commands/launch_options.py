"""The options of ``onecycle launch``, including those that torchrun and deepspeed also have."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from engine.cli.commands.arguments import SET_HELP, parse_positive_int
from engine.distributed.environment import USAGE

__all__ = ["EPILOG", "EXAMPLES", "add_options"]

EPILOG = """\
S is a time in seconds. Options that torchrun or deepspeed call by another name, such as
--nproc-per-node, --num_gpus and --master_port, are also accepted by that name.

exit status: 0 all ranks succeeded; 1 the config is invalid; 2 usage error; 69 a host is unreachable
or has different package versions; 75 a host was lost; 124 the rendezvous timed out; 128 + n the
launcher received signal n. If a rank fails, the status is that of the first failed rank: 128 + n if
signal n ended it, or 75 if it saved a checkpoint and exited after SIGTERM or SIGUSR1.
"""

EXAMPLES = (
    "onecycle launch --nproc 2 train.py ds_config.json",
    "onecycle launch --nproc 2 --set train_batch_size=64 train.py ds_config.json",
    "onecycle launch --hostfile hostfile --include node0@node1:0,1 train.py",
    "onecycle launch --hostfile hostfile --dry-run train.py",
    "onecycle launch --hostfile hostfile --nnodes 1:2 --max-restarts 3 train.py",
    "onecycle launch --hostfile hostfile --max-restarts 3 --rejoin train.py",
    "onecycle launch --nnodes 2 --nproc 8 --write-sbatch job.sbatch train.py",
)

_UNSUPPORTED = {
    "is not needed: `onecycle launch` starts the script on all hosts from one machine. Use "
    "`--hostfile` or `--slurm`, or start torchrun on each host yourself.": (
        *("--node-rank", "--no-ssh", "--rdzv-endpoint", "--rdzv-id", "--local-addr"),
    ),
    "is not supported. Set the timeout of the rendezvous with `--rdzv-timeout`.": ("--rdzv-conf",),
    "is not supported. Use `--hostfile` to launch over ssh, or `--slurm`.": ("--launcher",),
    "is not supported. Use `--ssh-opt` or `--slurm-opt`.": ("--launcher-args",),
    "is not supported. Use `--console` to select the ranks whose output is printed, and "
    "`--log-dir` for log files.": ("--tee", "-t", "--redirects", "-r", "--local-ranks-filter"),
    "is not supported. Set the interpreter of the virtual environment with `--python`.": (
        "--venv-script",
    ),
    "is not supported. Remove this option, or start the script with torchrun or deepspeed.": (
        *("--monitor-interval", "--start-method", "--role", "--run-path", "--numa-binding"),
        *("--event-log-handler", "--logs-specs", "--signals-to-handle", "--virtual-local-rank"),
        *("--duplicate-stdout-filters", "--duplicate-stderr-filters"),
        *("--autotuning", "--save-pid", "--bind-core-list", "--log-level", "--quiet", "-q"),
    ),
}
"""Maps each error message to the options of torchrun and deepspeed that cause it."""

_ALWAYS_TRUE = ("--no-local-rank", "--force-multi")
"""Flags of deepspeed that `onecycle launch` ignores, because it always acts as if they were set."""


class _Unsupported(argparse.Action):
    """An argparse action that prints advice on an unsupported option, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> NoReturn:
        parser.exit(USAGE, f"onecycle: `{arguments[-1]}` {self.const}\n")


class _Group:
    """A group of options in the help of ``onecycle launch``.

    Each option is available under the name that the help shows, and under the names that torchrun
    and deepspeed use.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def add(self, *names: str, also: tuple[str, ...] = (), **settings: Any) -> None:
        """Add an option.

        Args:
            names: names of the option, as shown in the help.
            also: names of the option in torchrun or deepspeed. The help does not show them.
                As in torchrun, underscores can replace the hyphens in each name.
            settings: keyword arguments for ``add_argument`` of ``argparse``.
        """
        action = self._group.add_argument(*names, **settings)
        spellings = {_underscore(name): None for name in (*names, *also)} | dict.fromkeys(also)
        hidden = [name for name in spellings if name not in names]
        if hidden:
            settings |= {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            self._group.add_argument(*hidden, **settings | {"dest": action.dest})


def _underscore(name: str) -> str:
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options and the script argument of ``onecycle launch`` to a parser."""
    parser.allow_abbrev = False  # an abbreviation would match several spellings of one option
    _add_host_options(_Group(parser, "hosts"))
    _add_rank_options(_Group(parser, "ranks"))
    _add_launcher_options(_Group(parser, "launcher"))
    script = _Group(parser, "script")
    module_help = "run SCRIPT as a module, like `python -m`"
    script.add("-m", "--module", action="store_true", help=module_help)
    command_help = "run SCRIPT as a command, not as a Python file"
    script.add("--no-python", action="store_true", help=command_help)
    script.add(
        "--pass-local-rank",
        action="store_true",
        help="add --local_rank=N to the arguments of SCRIPT, as deepspeed does",
    )
    script_help = "training script and its arguments"
    script.add("script", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS", help=script_help)
    _add_hidden_options(script)


def _add_hidden_options(group: _Group) -> None:
    hidden = argparse.SUPPRESS
    group.add("--standalone", action="store_true", help=hidden)
    group.add("--rdzv-backend", choices=["c10d"], help=hidden)
    for name in _ALWAYS_TRUE:
        group.add(name, action="store_true", help=hidden)
    for advice, names in _UNSUPPORTED.items():
        for name in names:
            group.add(
                name, action=_Unsupported, nargs="?", const=advice, help=hidden, default=hidden
            )


def _add_host_options(group: _Group) -> None:
    add = group.add
    hostfile_help = "hostfile: one line `host slots=N` per host (default for N: --nproc)"
    add("--hostfile", also=("-H",), type=Path, metavar="F", help=hostfile_help)
    include_help = "hosts and slots to use, for example node0@node1:0,2-3"
    add("--include", also=("-i",), default="", metavar="H", help=include_help)
    exclude_help = "hosts and slots to exclude, in the format of --include"
    add("--exclude", also=("-e",), default="", metavar="H", help=exclude_help)
    add(
        "--nproc",
        also=("--nproc-per-node", "--num-gpus", "--num-accelerators"),
        default="auto",
        metavar="N",
        help="processes per host (default: one per GPU)",
    )
    nnodes_help = "number of hosts, or MIN:MAX to continue while at least MIN hosts are left"
    add("--nnodes", also=("--num-nodes",), metavar="N|MIN:MAX", help=nnodes_help)
    slurm_help = "submit a Slurm job, or run in the current Slurm allocation"
    add("--slurm", action="store_true", help=slurm_help)
    sbatch_help = "write the Slurm job script to a file without submitting it"
    add("--write-sbatch", type=Path, metavar="F", help=sbatch_help)
    option_help = "#SBATCH option, such as time=30; can be repeated"
    add("--slurm-opt", action="append", default=[], metavar="K=V", help=option_help)
    ssh_help = (
        "ssh option, such as ProxyJump=gate; to pass a flag, write --ssh-opt=-v; can be repeated"
    )
    add("--ssh-opt", action="append", default=[], metavar="O", help=ssh_help)
    add("--ssh-port", type=parse_positive_int, metavar="P", help="ssh port on every host")


def _add_rank_options(group: _Group) -> None:
    add = group.add
    add(
        "--env",
        action="append",
        default=[],
        metavar="K=V",
        help="environment variable to set for every rank; can be repeated",
    )
    file_help = "file of environment variables: one K=V per line; # starts a comment"
    add("--env-file", type=Path, metavar="F", help=file_help)
    pattern_help = (
        "environment variables to forward, such as WANDB_*; can be repeated. NCCL_*, HF_* and some "
        "others are always forwarded"
    )
    add("--pass-env", action="append", default=[], metavar="PATTERN", help=pattern_help)
    add("--cwd", default=".", metavar="D", help="working directory on every host")
    python_help = "Python interpreter on every host (default: the current interpreter)"
    add("--python", default=sys.executable, metavar="EXE", help=python_help)
    bind_help = "bind each rank to its own CPU cores"
    add("--bind-cores", also=("--bind-cores-to-rank",), action="store_true", help=bind_help)
    log_help = "directory for the log files, one per rank"
    add("--log-dir", also=("--enable-each-rank-log",), metavar="D", help=log_help)
    restarts_help = "maximum number of restarts (default: 0)"
    add("--max-restarts", type=int, default=0, metavar="R", help=restarts_help)
    timeout_help = "timeout of collectives in seconds (default: 600)"
    add("--timeout", type=parse_positive_int, default=600, metavar="S", help=timeout_help)
    add(
        "--grace",
        also=("--shutdown-timeout",),
        type=parse_positive_int,
        default=30,
        metavar="S",
        help="seconds to wait for the ranks to save a checkpoint before killing them (default: 30)",
    )


def _add_launcher_options(group: _Group) -> None:
    add = group.add
    add(
        "--config",
        metavar="F",
        help="config to validate before launch (default: the .json file in ARGS)",
    )
    set_help = (
        f"{SET_HELP}. The override applies to each config that SCRIPT passes to engine.initialize"
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    rejoin_help = "try to reconnect to a lost host for up to --rdzv-timeout seconds"
    add("--rejoin", action="store_true", help=rejoin_help)
    rendezvous_help = "timeout of the rendezvous in seconds (default: 300)"
    add("--rdzv-timeout", type=parse_positive_int, default=300, metavar="S", help=rendezvous_help)
    port_help = "port of the rendezvous (default: a free port)"
    add("--port", also=("--master-port",), type=int, default=0, metavar="P", help=port_help)
    address_help = (
        "address at which the other hosts reach the first host (default: the address that ssh uses)"
    )
    add("--master-addr", metavar="A", help=address_help)
    iface_help = "network interface for Gloo and NCCL (default: the interface that ssh uses)"
    add("--iface", metavar="NAME", help=iface_help)
    choices = ["all", "rank0", "none"]
    console_help = (
        "ranks whose output is printed (default: rank0). The last lines of the first failed "
        "rank's output are always printed"
    )
    add("--console", choices=choices, default="rank0", help=console_help)
    dry_run_help = "print the launch plan and exit, without connecting to any host"
    add("--dry-run", action="store_true", help=dry_run_help)
    add("--json", action="store_true", help="with --dry-run: print the launch plan as JSON")
    preflight_help = "skip the preflight checks of the hosts"
    add("--no-preflight", also=("--no-ssh-check",), action="store_true", help=preflight_help)

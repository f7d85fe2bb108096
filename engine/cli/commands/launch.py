"""``onecycle launch``: start, watch and stop a script on one host or many."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from engine.cli.commands.arguments import INVALID, OK, USAGE, positive
from engine.errors import LaunchError
from engine.launch.hosts import Host, read_hostfile, selected
from engine.launch.plan import HostFacts, Wanted, masked_json, plan_of
from engine.launch.preflight import UNREACHABLE, preflight
from engine.launch.probe import free_port
from engine.launch.runner import ends_with
from engine.launch.runner import run as run_plan
from engine.launch.slurm import sbatch_of

__all__ = ["add", "run"]

_HOSTFILE = "must come with `--hostfile`, whose hosts it is about."
_NOT_IN_SLURM = "must be absent in a Slurm job, "
# By which ways of starting ranks an option is honoured, and what to say where it is not.
_HONOURED: dict[str, tuple[set[str], str]] = {
    "include": ({"ssh"}, _HOSTFILE),
    "exclude": ({"ssh"}, _HOSTFILE),
    "ssh_opt": ({"ssh"}, _HOSTFILE),
    "port": ({"ssh"}, "must come with `--hostfile`: elsewhere the port is chosen by itself."),
    "rejoin": (
        {"ssh"},
        "must come with `--hostfile`: one machine is never lost alone, Slurm queues jobs again.",
    ),
    "slurm_opt": ({"slurm"}, "must come with `--slurm` or `--write-sbatch`."),
    "console": ({"ssh", "local"}, f"{_NOT_IN_SLURM}whose log has the lines of all ranks."),
    "pass_env": (
        {"ssh", "local"},
        f"{_NOT_IN_SLURM}which has the whole environment that it is submitted from.",
    ),
    "no_preflight": ({"ssh", "local"}, f"{_NOT_IN_SLURM}whose hosts are not known yet."),
}

_EPILOG = """\
exit status: 0 all ranks were well; the status of the first rank that failed (128 + n: a signal);
128 + n: the launcher got signal n; 1 the config is wrong; 2 wrong usage; 69 a host cannot be
reached or has other versions; 75 a host was lost, or the run saved and ended because it was told
to; 124 the hosts did not find one another in time

examples:
  onecycle launch --nproc 2 train.py --epochs 3
  onecycle launch --hostfile hostfile --include node0@node1:0,1 train.py
  onecycle launch --hostfile hostfile --dry-run train.py
  onecycle launch --hostfile hostfile --nnodes 1:2 --max-restarts 3 train.py
  onecycle launch --hostfile hostfile --max-restarts 3 --rejoin train.py
  onecycle launch --nnodes 2 --nproc 8 --write-sbatch job.sbatch train.py
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Start a script on this machine, on the hosts of a file by ssh, or as a Slurm job. Ranks,\n"
        "rendezvous and restarts are torchrun's; when a rank fails, all others are stopped."
    )
    parser.epilog = _EPILOG
    where = parser.add_argument_group("where")
    where.add_argument("--hostfile", type=Path, metavar="F", help="lines `host slots=N`, for ssh")
    where.add_argument("--include", default="", metavar="H", help="node0@node1:0,2-3: only these")
    where.add_argument("--exclude", default="", metavar="H", help="the same: all but these")
    where.add_argument("--nproc", default="auto", metavar="N", help="processes a host (auto: GPUs)")
    where.add_argument("--nnodes", metavar="N|MIN:MAX", help="hosts; a range: some may be lost")
    where.add_argument(
        "--slurm",
        action="store_true",
        help="submit it as a Slurm job; inside of one, run it",
    )
    where.add_argument("--write-sbatch", type=Path, metavar="F", help="write that job's script")
    where.add_argument(
        "--slurm-opt", action="append", default=[], metavar="K=V", help="an #SBATCH option"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--config", metavar="F", help="proved first (default: a .json among ARGS)")
    how.add_argument("--max-restarts", type=int, default=0, metavar="R", help="(default: 0)")
    how.add_argument(
        "--rejoin",
        action="store_true",
        help="a lost host may come back within --rdzv-timeout; it is called until then",
    )
    how.add_argument("--timeout", type=positive, default=600, help="seconds a collective may take")
    how.add_argument("--rdzv-timeout", type=positive, default=300, help="to find one another")
    how.add_argument("--port", type=int, default=0, help="of the rendezvous (default: free)")
    how.add_argument("--iface", metavar="NAME", help="network interface (default: ssh's)")
    how.add_argument("--env", action="append", default=[], metavar="K=V", help="for all ranks")
    how.add_argument("--env-file", type=Path, metavar="F", help="lines K=V, # comments")
    how.add_argument(
        "--pass-env",
        action="append",
        default=[],
        metavar="PATTERN",
        help="of this environment, for ranks by ssh, as WANDB_* (NCCL_*, HF_* and others are)",
    )
    how.add_argument("--cwd", default=".", metavar="D", help="folder to run in, on every host")
    how.add_argument(
        "--python", default=sys.executable, metavar="EXE", help="on every host (default: this one)"
    )
    how.add_argument(
        "--ssh-opt", action="append", default=[], metavar="O", help="as -oProxyJump=gate"
    )
    how.add_argument("--grace", type=positive, default=30, help="seconds to save before a kill")
    how.add_argument("--bind-cores", action="store_true", help="each rank on cores of its own")
    how.add_argument("--log-dir", metavar="D", help="a file for each rank")
    how.add_argument(
        "--console",
        choices=["all", "rank0", "none"],
        default="rank0",
        help="whose lines are shown (default: rank0; of a failed rank the last ones always)",
    )
    how.add_argument("--dry-run", action="store_true", help="print the plan; contact no host")
    how.add_argument("--json", action="store_true", help="the plan as JSON")
    how.add_argument("--no-preflight", action="store_true", help="ask no host before starting")
    what = parser.add_argument_group("what")
    what.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module's name")
    what.add_argument("--no-python", action="store_true", help="SCRIPT is any command")
    what.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Launch, or say why not."""
    script = tuple(args.script[1:] if args.script[:1] == ["--"] else args.script)
    if not script:
        raise LaunchError("a script must follow: `onecycle launch --nproc 2 train.py ARGS`.")
    if not args.module and not args.no_python and not Path(args.cwd, script[0]).is_file():
        raise FileNotFoundError(2, "there is no such script", script[0])
    if sys.platform != "linux":
        raise LaunchError(
            "`onecycle launch` must run on Linux, by whose means it leaves no process behind; here "
            "start the script with torchrun."
        )
    if not 0 <= args.port < 2**16:
        raise LaunchError(f"`--port` must be 0 to 65535, but is {args.port}.")
    _refuse_what_is_not_honoured(args)
    hosts, least = _hosts(args)
    runs_command = args.no_python
    config = args.config or _config_among(script, args.cwd)
    if args.bind_cores:
        script, runs_command = _bound(args, script), True
    wanted = Wanted(
        script=script,
        hosts=hosts,
        is_local=args.hostfile is None,
        is_command=runs_command,
        is_module=args.module and not runs_command,
        least_nodes=least,
        max_restarts=args.max_restarts,
        timeout=args.timeout,
        rendezvous_timeout=args.rdzv_timeout,
        store=_store(args),
        port=args.port,
        interface=args.iface,
        env=_env(args),
        pass_env=tuple(args.pass_env),
        cwd=str(Path(args.cwd).resolve()),
        python=args.python,
        log_dir=args.log_dir and str(Path(args.log_dir).resolve()),
        grace=args.grace,
        ssh_options=tuple(args.ssh_opt),
        job=f"onecycle-{os.getpid()}-{int(time.time())}",
    )
    if config and (status := _prove(config, sum(host.size for host in hosts), out)):
        return status
    if args.slurm or args.write_sbatch:
        return _slurm(args, wanted, out)
    facts: dict[str, HostFacts] = {}
    if not (args.dry_run or args.no_preflight):
        facts, status = _preflight(wanted, config, out)
        if status:
            return status
    plan = plan_of(wanted, facts, os.environ)
    if args.dry_run:
        print(masked_json(plan) if args.json else plan.describe(), file=out)
        return OK
    return ends_with(run_plan(plan, args.console, out))


def _refuse_what_is_not_honoured(args: argparse.Namespace) -> None:
    """Refuse an option that this way of starting ranks would leave aside.

    Raises:
        LaunchError: there is one.
    """
    in_slurm = args.slurm or args.write_sbatch is not None
    way = "slurm" if in_slurm else "ssh" if args.hostfile else "local"
    if args.hostfile and in_slurm:
        raise LaunchError(
            "the hosts must come from `--hostfile` or from Slurm, but both are given."
        )
    for option, (ways, cure) in _HONOURED.items():
        value = getattr(args, option)
        if way not in ways and value not in (None, False, 0, [], "", "rank0"):
            name = f"--{option.replace('_', '-')}"
            raise LaunchError(f"`{name}` {cure}")
    if args.json and not args.dry_run:
        raise LaunchError("`--json` must come with `--dry-run`, whose plan it prints.")


def _bound(args: argparse.Namespace, script: tuple[str, ...]) -> tuple[str, ...]:
    """Return the command of a rank that binds itself to its cores before it begins."""
    begin = () if args.no_python else (args.python, "-u", *(("-m",) if args.module else ()))
    return (args.python, "-m", "engine.launch.affinity", *begin, *script)


def _store(args: argparse.Namespace) -> tuple[str, int] | None:
    """Return where this process is to keep the rendezvous, if it is."""
    if not args.rejoin:
        return None
    port = free_port(args.port)
    if port is None:
        raise LaunchError(f"port {args.port} is taken here; give another `--port`.")
    return socket.gethostname(), port


def _hosts(args: argparse.Namespace) -> tuple[tuple[Host, ...], int | None]:
    least, most = _nodes(args.nnodes)
    if args.slurm or args.write_sbatch:
        size = _processes(args.nproc)
        return tuple(Host(f"node{i}", tuple(range(size))) for i in range(most or 1)), least
    if args.hostfile is None:
        if (most or 1) > 1:
            raise LaunchError("several hosts must be in a file: give `--hostfile`, or `--slurm`.")
        return (Host("localhost", tuple(range(_processes(args.nproc)))),), None
    hosts = selected(read_hostfile(args.hostfile), args.include, args.exclude)
    if args.nproc != "auto":
        size = _processes(args.nproc)
        small = [host.name for host in hosts if host.size < size]
        if small:
            raise LaunchError(
                f"`--nproc` asks for {size} processes, but {small[0]} has fewer slots."
            )
        hosts = [Host(host.name, host.slots[:size]) for host in hosts]
    if most is not None and most > len(hosts):
        raise LaunchError(f"`--nnodes` asks for {most} hosts, but there are {len(hosts)}.")
    return tuple(hosts[:most]), least


def _nodes(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    low, colon, high = text.partition(":")
    if not low.isdecimal() or (colon and not high.isdecimal()) or int(low) < 1:
        raise LaunchError(f"`--nnodes` must be a number or MIN:MAX, but is {text!r}.")
    if colon and int(high) < int(low):
        raise LaunchError(f"`--nnodes` must be MIN:MAX with MIN at most MAX, but is {text!r}.")
    return (int(low), int(high)) if colon else (None, int(low))


def _processes(text: str) -> int:
    if text != "auto":
        if not text.isdecimal() or int(text) < 1:
            raise LaunchError(f"`--nproc` must be a number from 1 on, or auto, but is {text!r}.")
        return int(text)
    import torch

    return max(1, torch.cuda.device_count())


def _env(args: argparse.Namespace) -> dict[str, str]:
    given = []
    for path in (Path(".deepspeed_env"), args.env_file):
        if path is not None and (path is args.env_file or path.is_file()):
            given += [
                line
                for line in path.read_text(encoding="utf-8").splitlines()
                if line.strip() and not line.lstrip().startswith("#")
            ]
    found = {}
    for line in (*given, *args.env):
        name, equals, value = line.partition("=")
        if not equals or not name.strip():
            raise LaunchError(f"an environment variable must be NAME=VALUE, but is {line!r}.")
        found[name.strip()] = value
    return found


def _config_among(script: tuple[str, ...], cwd: str) -> str | None:
    """Return the first argument that is a config: a JSON file with a section of one."""
    for argument in script[1:]:
        path = Path(cwd, argument.rpartition("=")[2])
        if path.suffix == ".json" and path.is_file():
            from engine.config import load_document

            value = load_document(path).value
            known = {"train_batch_size", "train_micro_batch_size_per_gpu", "optimizer", "scheduler"}
            if isinstance(value, dict) and known & value.keys():
                return str(path if cwd == "." else path.resolve())
    return None


def _prove(config: str, world_size: int, out: TextIO) -> int:
    from engine.config import validate
    from engine.display.problem_reports import write_error
    from engine.errors import ConfigError

    errors = [each for each in validate(config, world_size=world_size) if each.severity == "error"]
    if not errors:
        return OK
    write_error(ConfigError(config, errors), out)
    return INVALID


def _preflight(wanted: Wanted, config: str | None, out: TextIO) -> tuple[dict[str, HostFacts], int]:
    verdicts = preflight(wanted, config and str(Path(config).resolve()))
    wrong = [verdict for verdict in verdicts if verdict.problem]
    for verdict in wrong:
        print(f"{verdict.host}: {verdict.problem}", file=out)
    if wrong:
        print(
            f"{len(wrong)} of {len(verdicts)} hosts cannot be used; nothing was started", file=out
        )
        return {}, UNREACHABLE
    return {verdict.host: verdict.facts for verdict in verdicts if verdict.facts}, OK


def _refuse_another_allocation(args: argparse.Namespace, nodes: int) -> None:
    there = int(os.environ.get("SLURM_JOB_NUM_NODES", nodes))
    if nodes != there:
        raise LaunchError(f"`--nnodes` must be {there}, as this allocation has, but is {nodes}.")
    if args.slurm_opt:
        raise LaunchError(
            f"`--slurm-opt {args.slurm_opt[0]}` must go to salloc: this allocation is made already."
        )


def _slurm(args: argparse.Namespace, wanted: Wanted, out: TextIO) -> int:
    options = dict(option.partition("=")[::2] for option in args.slurm_opt)
    text = sbatch_of(wanted, options)
    if args.write_sbatch:
        args.write_sbatch.write_text(text, encoding="utf-8")
        print(f"{args.write_sbatch}: submit it with sbatch", file=out)
        return OK
    if args.dry_run:
        print(json.dumps({"sbatch": text}) if args.json else text, file=out)
        return OK
    if "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ:
        _refuse_another_allocation(args, len(wanted.hosts))
        out.flush()
        os.execvp("bash", ["bash", "-c", text])  # so that signals reach srun as from a shell  # noqa: S606, S607
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise LaunchError("there is no sbatch here; write the job with --write-sbatch instead.")
    done = subprocess.run(  # noqa: S603  # Slurm's own
        [sbatch], input=text, text=True, capture_output=True, check=False
    )
    print((done.stdout + done.stderr).strip(), file=out)
    return OK if done.returncode == 0 else USAGE

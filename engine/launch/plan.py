"""What a launch will do, as data: a pure function of what was asked for and what the hosts said."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from engine.distributed.environment import ELASTIC, TIMEOUT
from engine.errors import LaunchError
from engine.launch.hosts import Host

__all__ = [
    "HostFacts",
    "LaunchPlan",
    "NodePlan",
    "Wanted",
    "environment_of",
    "masked_json",
    "plan_of",
    "ssh_to",
]

_PASSED = ("NCCL_*", "GLOO_*", "TORCH_*", "OMP_*", "HF_*", "CUDA_*", "ONECYCLE_*", "PYTHONPATH")
_NEVER = ("CUDA_VISIBLE_DEVICES",)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|CREDENTIAL|PRIVATE", re.IGNORECASE)
_PORT = 29400


@dataclass(frozen=True)
class Wanted:
    """What the user asks for."""

    script: tuple[str, ...]
    """The script with its arguments, or with ``is_command`` any command."""
    hosts: tuple[Host, ...]
    is_local: bool = True
    """Whether the one host is this machine; else hosts are reached by ssh."""
    is_command: bool = False
    is_module: bool = False
    least_nodes: int | None = None
    """Fewest hosts that may go on; None: all of them."""
    max_restarts: int = 0
    timeout: int = 600
    rendezvous_timeout: int = 300
    store: tuple[str, int] | None = None
    """Where the launcher keeps the rendezvous, so that any host may be lost and come back."""
    port: int = 0
    interface: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    pass_env: tuple[str, ...] = ()
    cwd: str = "."
    python: str = "python"
    log_dir: str | None = None
    grace: int = 30
    ssh_options: tuple[str, ...] = ()
    job: str = "onecycle"


@dataclass(frozen=True)
class HostFacts:
    """What a host said of itself."""

    address: str
    interface: str | None = None
    port: int | None = None
    launcher: str | None = None
    """The launcher's address as this host sees it."""


@dataclass(frozen=True)
class NodePlan:
    """One host's part."""

    host: str
    transport: tuple[str, ...]
    """The command that starts the agent; the rest goes to its standard input."""
    argv: tuple[str, ...]
    """What the agent runs: torchrun's arguments."""
    env: Mapping[str, str]
    cwd: str
    ranks: tuple[int, ...]
    devices: tuple[int, ...]
    grace: int
    lock: str | None = None
    """Held by one agent of the job: a host that comes back may still have its old one."""

    def spec(self) -> dict[str, Any]:
        """Return what the agent is told."""
        return {
            "host": self.host,
            "argv": list(self.argv),
            "env": dict(self.env),
            "cwd": self.cwd,
            "grace": self.grace,
            "lock": self.lock,
        }


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that is going to be started."""

    nodes: tuple[NodePlan, ...]
    least_nodes: int
    world_size: int
    store_port: int | None = None
    """Where the launcher itself keeps the rendezvous; None: the first host does."""
    patience: int = 0
    """Seconds that a lost host has to come back; 0: it is not waited for."""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON has it, with secrets masked."""
        nodes = [
            node.spec()
            | {
                "transport": list(node.transport),
                "ranks": list(node.ranks),
                "devices": list(node.devices),
                "env": {name: _masked(name, value) for name, value in node.env.items()},
            }
            for node in self.nodes
        ]
        return {
            "world_size": self.world_size,
            "least_nodes": self.least_nodes,
            "store_port": self.store_port,
            "nodes": nodes,
        }

    def describe(self) -> str:
        """Return the plan as text: which ranks are where, and a command to paste for each host."""
        lines = [f"{self.world_size} ranks on {len(self.nodes)} hosts"]
        for node in self.nodes:
            slots = ", ".join(
                f"rank {rank} = slot {slot}"
                for rank, slot in zip(node.ranks, node.devices, strict=True)
            )
            lines += ["", f"# {node.host}: {slots}"]
            env = [f"{name}={_masked(name, value)}" for name, value in sorted(node.env.items())]
            command = ["env", *env, *node.argv]
            lines.append(f"cd {shlex.quote(node.cwd)} && {shlex.join(command)}")
        return "\n".join(lines)


def plan_of(
    wanted: Wanted, facts: Mapping[str, HostFacts], environment: Mapping[str, str]
) -> LaunchPlan:
    """Return what to start where.

    Args:
        wanted: what was asked for.
        facts: of each host by its name; one that is absent is reached by its name.
        environment: the launcher's own, of which some is passed on.

    Raises:
        LaunchError: what was asked for cannot be.
    """
    hosts = wanted.hosts
    sizes = {host.size for host in hosts}
    if len(sizes) > 1 and wanted.least_nodes is not None:
        raise LaunchError("hosts must have the same number of slots where some may be lost.")
    least = wanted.least_nodes or len(hosts)
    if not 1 <= least <= len(hosts):
        raise LaunchError(f"the least number of hosts must be 1 to {len(hosts)}, but is {least}.")
    if wanted.store is not None and not wanted.max_restarts:
        raise LaunchError(
            "`--rejoin` must come with `--max-restarts`: the ranks that are left start anew when a "
            "host is lost, and again when it is back."
        )
    known = {host.name: facts.get(host.name) or HostFacts(host.name) for host in hosts}
    first = known[hosts[0].name]
    nodes, next_rank = [], 0
    for index, host in enumerate(hosts):
        ranks = tuple(range(next_rank, next_rank + host.size))
        next_rank += host.size
        own = known[host.name]
        endpoint = f"{first.address}:{wanted.port or first.port or _PORT}"
        if wanted.store is not None:
            endpoint = f"{own.launcher or wanted.store[0]}:{wanted.store[1]}"
        holds_store = index == 0 and wanted.store is None
        rendezvous = _rendezvous(wanted, endpoint, own, holds_store=holds_store, least=least)
        env = _environment(wanted, host, own, environment)
        nodes.append(
            NodePlan(
                host.name,
                _transport(wanted, host),
                (
                    *(wanted.python, "-m", "engine.launch.torchrun"),
                    *rendezvous,
                    *("--nproc-per-node", str(host.size)),
                    *("--max-restarts", str(wanted.max_restarts)),
                    *("--tee", "3", *(("--log-dir", wanted.log_dir) if wanted.log_dir else ())),
                    *(("--module",) if wanted.is_module else ()),
                    *(("--no-python",) if wanted.is_command else ()),
                    *wanted.script,
                ),
                env,
                wanted.cwd,
                ranks,
                host.slots,
                wanted.grace,
                f"{wanted.job}-{host.name}" if wanted.store else None,
            )
        )
    if wanted.store is None:
        return LaunchPlan(tuple(nodes), least, next_rank)
    patience = wanted.rendezvous_timeout
    return LaunchPlan(tuple(nodes), least, next_rank, wanted.store[1], patience)


def _rendezvous(
    wanted: Wanted, endpoint: str, own: HostFacts, *, holds_store: bool, least: int
) -> list[str]:
    count = len(wanted.hosts)
    if count == 1 and wanted.is_local:
        return ["--standalone"]
    nodes = str(count) if least == count else f"{least}:{count}"
    # Told which of them is the host, none has to guess it from names that resolve to loopback.
    conf = f"is_host={str(holds_store).lower()},join_timeout={wanted.rendezvous_timeout}"
    return [
        *("--nnodes", nodes),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint),
        *("--rdzv-id", wanted.job, "--rdzv-conf", conf, "--local-addr", own.address),
    ]


def environment_of(wanted: Wanted, size: int) -> dict[str, str]:
    """Return what every rank finds in its environment, by ssh and in a Slurm job alike."""
    env = {
        "PYTHONUNBUFFERED": "1",
        "LOCAL_SIZE": str(size),
        TIMEOUT: str(wanted.timeout),
        "DEEPSPEED_TIMEOUT": str(max(1, wanted.timeout // 60)),  # minutes
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(wanted.grace),
    }
    if wanted.max_restarts:
        # Else a restarted rank reads its peer's address of the life before (pytorch#135712).
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if wanted.least_nodes is not None and wanted.least_nodes < len(wanted.hosts):
        env[ELASTIC] = "1"
    return env


def _environment(
    wanted: Wanted, host: Host, own: HostFacts, environment: Mapping[str, str]
) -> dict[str, str]:
    patterns = (*_PASSED, *wanted.pass_env)
    passed = {
        name: value
        for name, value in environment.items()
        if name not in _NEVER and any(fnmatch(name, pattern) for pattern in patterns)
    }
    env = {
        **passed,
        **environment_of(wanted, host.size),
        "ONECYCLE_JOB_ID": wanted.job,
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": f"[{host.name}:r${{rank}}] ",
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // host.size)))
    interface = wanted.interface or own.interface
    if interface and len(wanted.hosts) > 1:
        for library in ("GLOO", "NCCL", "TP"):
            env.setdefault(f"{library}_SOCKET_IFNAME", interface)
    if not wanted.is_local and host.slots != tuple(range(host.size)):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.slots))
    return env | dict(wanted.env)


def _transport(wanted: Wanted, host: Host) -> tuple[str, ...]:
    agent = (wanted.python, "-m", "engine.launch.agent")
    return agent if wanted.is_local else (*ssh_to(wanted, host), shlex.join(agent))


def ssh_to(wanted: Wanted, host: Host) -> tuple[str, ...]:
    """Return the command that runs the one that is appended to it on a host."""
    # ssh takes the first of an option: the user's own win.
    options = (
        *wanted.ssh_options,
        *("BatchMode=yes", "ConnectTimeout=8", "ServerAliveInterval=5", "ServerAliveCountMax=3"),
    )
    return ("ssh", "-T", *(part for option in options for part in ("-o", option)), host.name)


def _masked(name: str, value: str) -> str:
    return "***" if _SECRET.search(name) else value


def masked_json(plan: LaunchPlan) -> str:
    """Return the plan as indented JSON."""
    return json.dumps(plan.to_json(), indent=1)

"""Build the launch plan: the command and the environment variables of each host.

This module does not contact hosts or start processes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from engine.distributed.environment import ELASTIC, JOB_ID, PREFIX, TIMEOUT
from engine.errors import LaunchError
from engine.launch.hosts import Host
from engine.launch.request import LaunchRequest, build_module_command

__all__ = [
    "HostFacts",
    "LaunchPlan",
    "NodePlan",
    "build_environment",
    "build_plan",
    "build_ssh_command",
    "format_assignments",
    "is_secret",
]

_PASSED_PATTERNS = (
    "NCCL_*",
    "GLOO_*",
    "TORCH_*",
    "OMP_*",
    "HF_*",
    "CUDA_*",
    f"{PREFIX}*",
    "PYTHONPATH",
)
_NEVER_PASSED_NAMES = ("CUDA_VISIBLE_DEVICES",)
_SECRET = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|API_?KEY|CREDENTIAL|PRIVATE|COOKIE"
    r"|(^|_)(KEY|PASS|PAT|AUTH)(_|$)",
    re.IGNORECASE,
)
_DEFAULT_PORT = 29400


@dataclass(frozen=True)
class HostFacts:
    """Network settings that a host reported during the preflight check."""

    address: str
    interface: str | None = None
    port: int | None = None
    launcher: str | None = None
    """Address of the launcher, as seen from this host; None if unknown."""


@dataclass(frozen=True)
class NodePlan:
    """The launch plan of one host: its ranks, commands and environment variables."""

    host: str
    transport: tuple[str, ...]
    """The command that starts onecycle's agent. The agent reads its job from standard input."""
    argv: tuple[str, ...]
    """The command that the agent runs: torchrun with its arguments."""
    env: Mapping[str, str]
    cwd: str
    ranks: tuple[int, ...]
    devices: tuple[int, ...]
    grace: int
    lock: str | None = None
    """Name of the lock that the agent must acquire before it starts the job; None for no lock.

    After the launcher reconnects to a lost host, the new agent waits until the old agent has
    released the lock.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the job that the agent on this host runs, as a JSON-compatible dict."""
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
    """The plans of all hosts, and the settings for the rendezvous."""

    nodes: tuple[NodePlan, ...]
    min_nodes: int
    world_size: int
    store_port: int | None = None
    """Port on which the launcher serves the rendezvous; None if the first host serves it."""
    patience: int = 0
    """Maximum time in seconds for reconnecting to a lost host; 0 disables reconnecting."""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON-compatible dict.

        The values of variables whose names suggest a secret, such as ``HF_TOKEN``, are masked.
        """
        nodes = [
            node.to_dict()
            | {
                "transport": list(node.transport),
                "ranks": list(node.ranks),
                "devices": list(node.devices),
                "env": {name: _mask(name, value) for name, value in node.env.items()},
            }
            for node in self.nodes
        ]
        return {
            "world_size": self.world_size,
            "min_nodes": self.min_nodes,
            "store_port": self.store_port,
            "nodes": nodes,
        }

    def describe(self, *, as_json: bool = False) -> str:
        """Return the plan as text: the ranks, slots and command of each host.

        Each command can be pasted into a shell. The values of variables whose names suggest a
        secret, such as ``HF_TOKEN``, are left out. Set these variables in the shell first.

        Args:
            as_json: whether to return the plan as indented JSON instead.
        """
        if as_json:
            return json.dumps(self.to_json(), indent=1)
        lines = [f"{self.world_size} ranks on {len(self.nodes)} hosts"]
        for node in self.nodes:
            slots = ", ".join(
                f"rank {rank} = slot {slot}"
                for rank, slot in zip(node.ranks, node.devices, strict=True)
            )
            lines += ["", f"# {node.host}: {slots}"]
            secrets = [name for name in sorted(node.env) if node.env[name] and is_secret(name)]
            if secrets:
                lines.append(f"# Set {', '.join(secrets)} before you run this command.")
            env = " ".join(format_assignments(dict(sorted(node.env.items())), hide_secrets=True))
            lines.append(f"cd {shlex.quote(node.cwd)} && env {env} {shlex.join(node.argv)}")
        return "\n".join(lines)


def build_plan(
    request: LaunchRequest, facts: Mapping[str, HostFacts], environment: Mapping[str, str]
) -> LaunchPlan:
    """Assign ranks to the requested hosts, and return the plan with the command of each host.

    Args:
        request: script, hosts and options of the launch.
        facts: network settings by host name. A host without an entry is addressed by its name.
        environment: environment variables of the launcher. The ranks receive variables that match a
            built-in pattern, such as ``NCCL_*``, or a pattern in ``request.pass_env``.

    Raises:
        LaunchError: if options conflict, or the minimum number of hosts is invalid.
    """
    min_nodes = request.min_nodes or len(request.hosts)
    _check_request(request, min_nodes)
    known = {host.name: facts.get(host.name) or HostFacts(host.name) for host in request.hosts}
    passed = _select_variables(request, environment)
    nodes, next_rank = [], 0
    for host in request.hosts:
        argv = (
            *build_module_command(request.python, "engine.launch.torchrun"),
            *_rendezvous_options(request, host, known, min_nodes),
            *_script_options(request, host),
            *request.script,
        )
        node = NodePlan(
            host.name,
            _build_transport(request, host),
            argv,
            _build_node_environment(request, host, known[host.name], passed),
            request.cwd,
            tuple(range(next_rank, next_rank + host.size)),
            host.slots,
            request.grace,
            f"{request.job}-{host.name}" if request.store else None,
        )
        nodes.append(node)
        next_rank += host.size
    if request.store is None:
        return LaunchPlan(tuple(nodes), min_nodes, next_rank)
    patience = request.rendezvous_timeout
    return LaunchPlan(tuple(nodes), min_nodes, next_rank, request.store[1], patience)


def _check_request(request: LaunchRequest, min_nodes: int) -> None:
    if request.min_nodes is not None and len({host.size for host in request.hosts}) > 1:
        raise LaunchError(
            "With `--nnodes MIN:MAX`, all hosts must have the same number of slots. Set `--nproc` "
            "to use the same number on each host."
        )
    if not 1 <= min_nodes <= len(request.hosts):
        raise LaunchError(
            f"MIN in `--nnodes MIN:MAX` must be between 1 and the number of hosts "
            f"({len(request.hosts)}), got {min_nodes}. Change MIN, or add hosts."
        )
    if request.store is not None and not request.max_restarts:
        raise LaunchError(
            "`--rejoin` requires `--max-restarts`, because all ranks restart when a host is lost "
            "and when it returns. For example, add `--max-restarts 3`."
        )


def _rendezvous_options(
    request: LaunchRequest, host: Host, known: Mapping[str, HostFacts], min_nodes: int
) -> Iterator[str]:
    count = len(request.hosts)
    if request.is_local and not request.port:
        yield "--standalone"
        return
    first, own = known[request.hosts[0].name], known[host.name]
    port = request.port or first.port or _DEFAULT_PORT
    endpoint = f"{request.address or first.address}:{port}"
    if request.store is not None:
        endpoint = f"{own.launcher or request.store[0]}:{request.store[1]}"
    # By default, torchrun finds the host of the rendezvous by its name. This fails if the name
    # resolves to a loopback address, so set `is_host` explicitly.
    is_host = host is request.hosts[0] and request.store is None
    conf = f"is_host={str(is_host).lower()},join_timeout={request.rendezvous_timeout}"
    yield from ("--nnodes", str(count) if min_nodes == count else f"{min_nodes}:{count}")
    yield from ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint)
    yield from ("--rdzv-id", request.job, "--rdzv-conf", conf, "--local-addr", own.address)


def _script_options(request: LaunchRequest, host: Host) -> Iterator[str]:
    yield from ("--nproc-per-node", str(host.size))
    yield from ("--max-restarts", str(request.max_restarts))
    yield from ("--tee", "3")
    if request.log_dir:
        yield from ("--log-dir", request.log_dir)
    if request.is_module:
        yield "--module"
    if request.is_command:
        yield "--no-python"


def build_environment(request: LaunchRequest, size: int) -> dict[str, str]:
    """Return the environment variables that onecycle sets on all ranks, with or without Slurm.

    Args:
        request: launch request.
        size: number of ranks per host.
    """
    env = {
        "PYTHONUNBUFFERED": "1",
        "LOCAL_SIZE": str(size),
        TIMEOUT: str(request.timeout),
        "DEEPSPEED_TIMEOUT": str(max(1, request.timeout // 60)),  # in minutes
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(request.grace),
    }
    if request.max_restarts:
        # Otherwise, a restarted rank reads an outdated address of another rank (pytorch#135712).
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if request.min_nodes is not None and request.min_nodes < len(request.hosts):
        env[ELASTIC] = "1"
    return env


def _select_variables(request: LaunchRequest, environment: Mapping[str, str]) -> dict[str, str]:
    """Select the launcher's environment variables to pass to the ranks."""
    patterns = (*_PASSED_PATTERNS, *request.pass_env)
    return {
        name: value
        for name, value in environment.items()
        if name not in _NEVER_PASSED_NAMES and any(fnmatch(name, pattern) for pattern in patterns)
    }


def _build_node_environment(
    request: LaunchRequest, host: Host, own: HostFacts, passed: Mapping[str, str]
) -> dict[str, str]:
    env = {
        **passed,
        **build_environment(request, host.size),
        JOB_ID: request.job,
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": f"[{host.name}:r${{rank}}] ",
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // host.size)))
    interface = request.interface or own.interface
    if interface and len(request.hosts) > 1:
        for library in ("GLOO", "NCCL", "TP"):
            env.setdefault(f"{library}_SOCKET_IFNAME", interface)
    if host.slots != tuple(range(host.size)):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.slots))
    return env | dict(request.env)


def _build_transport(request: LaunchRequest, host: Host) -> tuple[str, ...]:
    agent = build_module_command(request.python, "engine.launch.agent")
    return agent if request.is_local else (*build_ssh_command(request, host), shlex.join(agent))


def build_ssh_command(request: LaunchRequest, host: Host) -> tuple[str, ...]:
    """Return the ssh command that connects to a host, without a remote command.

    >>> request = LaunchRequest((), (), ssh_options=("ProxyJump=gate", "-p 22", "-oUser=me"))
    >>> build_ssh_command(request, Host("node0", (0,)))[:7]
    ('ssh', '-T', '-o', 'ProxyJump=gate', '-p', '22', '-oUser=me')
    """
    # If an option is repeated, ssh uses the first value, so put the user's options first.
    options = (
        *request.ssh_options,
        *("BatchMode=yes", "ConnectTimeout=8", "ServerAliveInterval=5", "ServerAliveCountMax=3"),
    )
    words = (word for option in options for word in _split_ssh_option(option))
    return ("ssh", "-T", *words, host.name)


def _split_ssh_option(option: str) -> Iterable[str]:
    if not option.startswith("-"):
        return ("-o", option)
    return option.split(maxsplit=1) if option[2:3].isspace() else (option,)


def format_assignments(env: Mapping[str, str], *, hide_secrets: bool) -> list[str]:
    """Return ``NAME=VALUE`` for each variable, quoted for a shell.

    Args:
        env: environment variables.
        hide_secrets: whether to omit the values of variables whose names suggest a secret. The
            shell then uses its own values of these variables, and fails if any of them is not set.

    >>> format_assignments({"A": "b c", "HF_TOKEN": "hf_123"}, hide_secrets=True)
    ["A='b c'", 'HF_TOKEN="${HF_TOKEN:?}"']
    """
    return [
        f'{name}="${{{name}:?}}"'
        if hide_secrets and value and is_secret(name)
        else f"{shlex.quote(name)}={shlex.quote(value)}"
        for name, value in env.items()
    ]


def is_secret(name: str) -> bool:
    """Return whether the name of a variable, such as ``HF_TOKEN``, suggests a secret."""
    return _SECRET.search(name) is not None


def _mask(name: str, value: str) -> str:
    return "***" if is_secret(name) else value

"""Check all hosts before a launch (the preflight check).

Each host must be reachable and able to connect to the rendezvous port. The package versions and the
config must be the same as on the launcher.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.distributed.environment import SSH_FAILED
from engine.launch.hosts import Host
from engine.launch.plan import HostFacts, build_ssh_command
from engine.launch.probe import probe
from engine.launch.processes import Finished, run_commands
from engine.launch.request import LaunchRequest, build_module_command

__all__ = ["HostCheck", "check_hosts"]

_TIMEOUT = 10.0
_NO_ANSWER = f"did not answer within {_TIMEOUT:.0f} seconds"


@dataclass(frozen=True)
class HostCheck:
    """The result of the preflight check of one host."""

    host: str
    facts: HostFacts | None
    problem: str = ""


def check_hosts(request: LaunchRequest, config: str | None) -> list[HostCheck]:
    """Check all hosts in parallel, and return one result per host.

    For up to 512 hosts, the check takes at most about 20 seconds.

    Args:
        request: launch request.
        config: path of the config, whose content must be the same on all hosts; None to skip the
            comparison.

    Raises:
        LaunchError: if the limit on open files or processes is too low.
    """
    if request.is_local:
        return [HostCheck(host.name, HostFacts("127.0.0.1")) for host in request.hosts]
    if shutil.which("ssh") is None:
        missing = "cannot be reached: ssh is not installed on the launcher"
        return [HostCheck(host.name, None, missing) for host in request.hosts]
    checks = _probe_hosts(request, config)
    if any(check.problem for check in checks):
        return checks
    with _open_rendezvous_port(request, checks[0]) as (address, port):
        return _check_connections(request, checks, address, port)


@contextlib.contextmanager
def _open_rendezvous_port(
    request: LaunchRequest, first: HostCheck
) -> Iterator[tuple[str | None, int]]:
    """Listen on the rendezvous port inside this context, and yield the pair ``(address, port)``.

    If the rendezvous is on the launcher, the address is None, because each host may reach the
    launcher at a different address.
    """
    assert first.facts is not None
    module = "engine.launch.reachability"
    if request.store is not None:
        address, port = None, request.store[1]
        command = (*build_module_command(sys.executable, module), str(port))
    else:
        address, port = request.address or first.facts.address, first.facts.port or 0
        command = _build_command(request, request.hosts[0], module, str(port))
    with subprocess.Popen(  # noqa: S603  # the user's own ssh, or this Python
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()  # if it cannot listen, the connection checks fail
        try:
            yield address, port
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                listener.communicate(timeout=_TIMEOUT)  # closing standard input ends the process
            listener.kill()


def _check_connections(
    request: LaunchRequest, checks: Sequence[HostCheck], address: str | None, port: int
) -> list[HostCheck]:
    """Check that each host can connect to the rendezvous port, and return one result per host.

    Args:
        request: launch request.
        checks: results of the probe, which every host must have passed.
        address: address of the rendezvous; None if the rendezvous is on the launcher.
        port: port of the rendezvous.
    """
    addresses = [address or str(check.facts and check.facts.launcher) for check in checks]
    found = run_commands(
        {
            host.name: _build_command(request, host, "engine.launch.reachability", own, str(port))
            for host, own in zip(request.hosts, addresses, strict=True)
        },
        _TIMEOUT,
    )
    return [
        replace(check, problem=_describe_connection(found[check.host], own, port))
        for check, own in zip(checks, addresses, strict=True)
    ]


def _describe_connection(done: Finished, address: str, port: int) -> str:
    error = (done.output or done.errors).strip()
    if done.returncode is None:
        error = _NO_ANSWER
    if not error:
        return ""
    return (
        f"cannot connect to the rendezvous at {address}, port {port}: {error}. Allow connections "
        "to this port between the hosts, or choose another port with `--port`."
    )


def _build_command(
    request: LaunchRequest, host: Host, module: str, *arguments: str
) -> tuple[str, ...]:
    """Return the ssh command that runs a Python module with arguments on a host."""
    remote = shlex.join([*build_module_command(request.python, module), *arguments])
    return (*build_ssh_command(request, host), f"cd {shlex.quote(request.cwd)} && {remote}")


def _probe_hosts(request: LaunchRequest, config: str | None) -> list[HostCheck]:
    """Probe all hosts, compare each host with the launcher, and return one result per host."""
    commands = {}
    for host in request.hosts:
        is_rendezvous_host = host is request.hosts[0] and request.store is None
        port = str(request.port if is_rendezvous_host else 0)
        arguments = [port, *([config] if config else [])]
        commands[host.name] = _build_command(request, host, "engine.launch.probe", *arguments)
    here = probe(config)
    found = run_commands(commands, _TIMEOUT)
    return [_read_probe(host.name, found[host.name], here, request.port) for host in request.hosts]


def _read_probe(host: str, done: Finished, here: Mapping[str, Any], port: int) -> HostCheck:
    if done.returncode is None:
        return HostCheck(host, None, _NO_ANSWER)
    if done.returncode:
        lines = done.errors.strip().splitlines() or ["no error message"]
        answer = (
            "cannot be reached"
            if done.returncode == SSH_FAILED
            else "is reachable, but the check failed"
        )
        return HostCheck(host, None, f"{answer}: {lines[-1]}")
    there = json.loads(done.output.splitlines()[-1])
    facts = HostFacts(*(there[name] for name in ("address", "interface", "port", "launcher")))
    problems = list(_find_differences(here, there))
    if not there["port"]:
        problems.insert(0, f"port {port} is already in use; choose another with `--port`")
    return HostCheck(host, facts, "; ".join(problems))


def _find_differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*here["versions"], *there["versions"]}):
        ours, theirs = here["versions"].get(name), there["versions"].get(name)
        if ours != theirs:
            yield (
                f"different versions of {name}: {theirs or 'not installed'} on this host, "
                f"{ours or 'not installed'} on the launcher"
            )
    if here["config"] != there["config"]:
        missing = there["config"] == "missing"
        yield (
            "the config does not exist on this host; copy it from the launcher"
            if missing
            else "the config differs from the launcher's; copy the launcher's config to this host"
        )

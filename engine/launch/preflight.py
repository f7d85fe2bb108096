"""Check all hosts before a launch (the preflight check).

Each host must be reachable, must be able to connect to the rendezvous port, and must have the same
package versions and the same config as the launcher.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from engine.distributed.environment import SSH_FAILED
from engine.launch import reachability
from engine.launch.hosts import Host
from engine.launch.plan import HostFacts, build_ssh_command
from engine.launch.probe import probe
from engine.launch.request import LaunchRequest, build_module_command

__all__ = ["HostCheck", "check_hosts"]

_TIMEOUT = 10.0


@dataclass(frozen=True)
class HostCheck:
    """The result of the preflight check of one host."""

    host: str
    facts: HostFacts | None
    problem: str = ""


def check_hosts(request: LaunchRequest, config: str | None) -> list[HostCheck]:
    """Check all hosts in parallel, and return one result per host.

    For up to 32 hosts, the check takes at most about 20 seconds.

    Args:
        request: launch request.
        config: path of the config, which must have the same content on all hosts; None if the
            launch has no config.
    """
    if request.is_local:
        return [HostCheck(host.name, HostFacts("127.0.0.1")) for host in request.hosts]
    here = probe(config)
    with ThreadPoolExecutor(max_workers=32) as pool:
        checks = list(
            pool.map(lambda host: _probe_host(request, host, config, here), request.hosts)
        )
        if any(check.problem for check in checks):
            return checks
        with _open_rendezvous_port(request, checks[0]) as endpoint:
            connected = pool.map(lambda check: _check_connection(request, check, endpoint), checks)
            return list(connected)


@contextlib.contextmanager
def _open_rendezvous_port(
    request: LaunchRequest, first: HostCheck
) -> Iterator[tuple[str | None, int]]:
    """Listen on the rendezvous port inside this context, and yield the address and the port number.

    If the launcher itself listens on the port, the address is None, because each host may use a
    different address to reach the launcher.
    """
    if request.store is not None:
        with reachability.listen(request.store[1]):
            yield None, request.store[1]
        return
    assert first.facts is not None
    port = first.facts.port or 0
    with subprocess.Popen(  # noqa: S603  # the user's own ssh
        _build_command(request, request.hosts[0], "engine.launch.reachability", str(port)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()  # if it cannot listen, the connection checks fail
        try:
            yield request.address or first.facts.address, port
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                listener.communicate(timeout=_TIMEOUT)  # closing standard input ends the process
            listener.kill()


def _check_connection(
    request: LaunchRequest, check: HostCheck, endpoint: tuple[str | None, int]
) -> HostCheck:
    assert check.facts is not None
    address, port = endpoint[0] or str(check.facts.launcher), endpoint[1]
    host = next(each for each in request.hosts if each.name == check.host)
    done = subprocess.run(  # noqa: S603  # the user's own ssh
        _build_command(request, host, "engine.launch.reachability", address, str(port)),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    error = (done.stdout or done.stderr).strip()
    if not error:
        return check
    problem = (
        f"cannot connect to the rendezvous at {address}, port {port}: {error}. Allow connections "
        "to this port between the hosts, or choose another port with `--port`."
    )
    return replace(check, problem=problem)


def _build_command(
    request: LaunchRequest, host: Host, module: str, *arguments: str
) -> tuple[str, ...]:
    """Return the ssh command that runs a Python module on a host with the given arguments."""
    remote = shlex.join([*build_module_command(request.python, module), *arguments])
    return (*build_ssh_command(request, host), f"cd {shlex.quote(request.cwd)} && {remote}")


def _probe_host(
    request: LaunchRequest, host: Host, config: str | None, here: Mapping[str, Any]
) -> HostCheck:
    is_rendezvous_host = host is request.hosts[0] and request.store is None
    arguments = [str(request.port if is_rendezvous_host else 0), *([config] if config else [])]
    try:
        done = subprocess.run(  # noqa: S603  # the user's own ssh
            _build_command(request, host, "engine.launch.probe", *arguments),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return HostCheck(host.name, None, f"did not answer within {_TIMEOUT:.0f} seconds")
    except FileNotFoundError:
        return HostCheck(host.name, None, "cannot be reached: ssh is not installed on the launcher")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no error message"]
        answer = (
            "cannot be reached"
            if done.returncode == SSH_FAILED
            else "is reachable, but the check failed"
        )
        return HostCheck(host.name, None, f"{answer}: {lines[-1]}")
    there = json.loads(done.stdout.splitlines()[-1])
    facts = HostFacts(*(there[name] for name in ("address", "interface", "port", "launcher")))
    problems = list(_find_differences(here, there))
    if not there["port"]:
        problems.insert(0, f"port {request.port} is already in use; choose another with `--port`")
    return HostCheck(host.name, facts, "; ".join(problems))


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
            "the config does not exist on this host"
            if missing
            else "the config differs from the launcher's; copy it to this host"
        )

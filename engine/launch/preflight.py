"""A verdict on each host before anything is started.

It answers, it has what this machine has, and it reaches the port where the ranks are to meet.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from engine.launch import reachability
from engine.launch.hosts import Host
from engine.launch.plan import HostFacts, Wanted, ssh_to
from engine.launch.probe import probe

__all__ = ["UNREACHABLE", "Verdict", "preflight"]

UNREACHABLE = 69
"""Exit status of a launch whose hosts do not all answer (EX_UNAVAILABLE)."""

_PATIENCE = 10.0


@dataclass(frozen=True)
class Verdict:
    """What a host said, and what is wrong with it."""

    host: str
    facts: HostFacts | None
    problem: str = ""


def preflight(wanted: Wanted, config: str | None) -> list[Verdict]:
    """Ask every host at once; return a verdict on each, within ten seconds or twenty.

    Args:
        wanted: which hosts, and how they are reached.
        config: a file that has to be the same on all of them.
    """
    if wanted.is_local:
        return [Verdict(host.name, HostFacts("127.0.0.1")) for host in wanted.hosts]
    here = probe(config)
    with ThreadPoolExecutor(max_workers=32) as pool:
        verdicts = list(pool.map(lambda host: _ask(wanted, host, config, here), wanted.hosts))
        if any(verdict.problem for verdict in verdicts):
            return verdicts
        with _meeting_place(wanted, verdicts[0]) as place:
            dialled = pool.map(lambda verdict: _dial_back(wanted, verdict, place), verdicts)
            return list(dialled)


@contextlib.contextmanager
def _meeting_place(wanted: Wanted, first: Verdict) -> Iterator[tuple[str | None, int]]:
    """Hold the port where ranks are to meet; yield its address, None if it is the launcher's."""
    if wanted.store is not None:
        with reachability.hold(wanted.store[1]):
            yield None, wanted.store[1]
        return
    assert first.facts is not None
    port = first.facts.port or 0
    with subprocess.Popen(  # noqa: S603  # the user's own ssh
        _command(wanted, wanted.hosts[0], "engine.launch.reachability", str(port)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()  # what is not held is not reached, and told of by those who dial
        try:
            yield first.facts.address, port
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                holder.communicate(timeout=_PATIENCE)  # its input ends, and so does it
            holder.kill()


def _dial_back(wanted: Wanted, verdict: Verdict, place: tuple[str | None, int]) -> Verdict:
    assert verdict.facts is not None
    address, port = place[0] or str(verdict.facts.launcher), place[1]
    host = next(each for each in wanted.hosts if each.name == verdict.host)
    done = subprocess.run(  # noqa: S603  # the user's own ssh
        _command(wanted, host, "engine.launch.reachability", address, str(port)),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    wrong = (done.stdout or done.stderr).strip()
    if not wrong:
        return verdict
    problem = (
        f"does not reach {address}, port {port}, where the ranks are to meet: {wrong}. Let it "
        "through between the hosts, or give another `--port`."
    )
    return replace(verdict, problem=problem)


def _command(wanted: Wanted, host: Host, module: str, *arguments: str) -> list[str]:
    """Return what runs one of our modules on a host."""
    remote = shlex.join([wanted.python, "-m", module, *arguments])
    return [*ssh_to(wanted, host), f"cd {shlex.quote(wanted.cwd)} && {remote}"]


def _ask(wanted: Wanted, host: Host, config: str | None, here: Mapping[str, Any]) -> Verdict:
    first = host is wanted.hosts[0] and wanted.store is None
    arguments = [str(wanted.port if first else 0), *([config] if config else [])]
    try:
        done = subprocess.run(  # noqa: S603  # the user's own ssh
            _command(wanted, host, "engine.launch.probe", *arguments),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Verdict(host.name, None, f"did not answer within {_PATIENCE:.0f} seconds")
    except FileNotFoundError:
        return Verdict(host.name, None, "cannot be reached: there is no ssh here; install it")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        reached = "answered, but failed" if done.returncode != 255 else "cannot be reached"
        return Verdict(host.name, None, f"{reached}: {said[-1]}")
    there = json.loads(done.stdout.splitlines()[-1])
    facts = HostFacts(*(there[name] for name in ("address", "interface", "port", "launcher")))
    taken = [] if there["port"] else [f"port {wanted.port} is taken there; give another `--port`"]
    return Verdict(host.name, facts, "; ".join([*taken, *_differences(here, there)]))


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    names = sorted({*here["versions"], *there["versions"]})
    pairs: Sequence[tuple[str, Any, Any]] = [
        (name, here["versions"].get(name), there["versions"].get(name)) for name in names
    ]
    other = [
        f"{name} {theirs or 'absent'} (here {ours or 'absent'})"
        for name, ours, theirs in pairs
        if ours != theirs
    ]
    if here["config"] != there["config"]:
        missing = there["config"] == "missing"
        other.append("the config is missing there" if missing else "the config is another one")
    return other

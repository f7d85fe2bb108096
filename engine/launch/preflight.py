"""A verdict on each host before anything is started: it answers, and has what this machine has."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from engine.launch.hostfile import Host
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
    """Ask every host at once; return a verdict on each, within ten seconds.

    Args:
        wanted: which hosts, and how they are reached.
        config: a file that has to be the same on all of them.
    """
    if wanted.is_local:
        return [Verdict(host.name, HostFacts("127.0.0.1")) for host in wanted.hosts]
    here = probe(config)
    with ThreadPoolExecutor(max_workers=32) as pool:
        return list(pool.map(lambda host: _ask(wanted, host, config, here), wanted.hosts))


def _ask(wanted: Wanted, host: Host, config: str | None, here: Mapping[str, Any]) -> Verdict:
    first = host is wanted.hosts[0] and wanted.store is None
    arguments = [str(wanted.port if first else 0), *([config] if config else [])]
    remote = shlex.join([wanted.python, "-m", "engine.launch.probe", *arguments])
    try:
        done = subprocess.run(  # noqa: S603  # the user's own ssh
            [*ssh_to(wanted, host), f"cd {shlex.quote(wanted.cwd)} && {remote}"],
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

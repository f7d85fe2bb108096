"""Hosts and their slots: DeepSpeed's hostfile, and what to include and exclude of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import LaunchError

__all__ = ["Host", "read_hostfile", "selected"]

_LINE = re.compile(r"(?P<name>[^\s#]+)\s+slots\s*=\s*(?P<slots>-?\d+)\s*(?:#.*)?")


@dataclass(frozen=True)
class Host:
    """A machine, and which of its slots are to be used; each is a process, and a GPU if it has any.

    >>> Host("node0", (0, 1, 3)).size
    3
    """

    name: str
    slots: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many processes it gets."""
        return len(self.slots)


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a file in DeepSpeed's format: ``host slots=N``, and ``#`` comments.

    Raises:
        LaunchError: a line is none of these, a host is there twice or has no slots, or none is.
        OSError: the file cannot be read.
    """
    hosts: dict[str, Host] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise LaunchError(f"{path}:{number}: must be `host slots=N`, but is {line.strip()!r}.")
        name, slots = found["name"], int(found["slots"])
        if slots < 1:
            raise LaunchError(
                f"{path}:{number}: {name} must have at least 1 slot, but has {slots}."
            )
        if name in hosts:
            raise LaunchError(
                f"{path}:{number}: {name} must be there once, but is a second time; add its slots "
                "to the first line."
            )
        hosts[name] = Host(name, tuple(range(slots)))
    if not hosts:
        raise LaunchError(
            f"{path} must name at least one host, as `node0 slots=2`, but names none."
        )
    return list(hosts.values())


def selected(hosts: list[Host], include: str = "", exclude: str = "") -> list[Host]:
    """Return the hosts and slots that are left by DeepSpeed's filters.

    Args:
        hosts: all of them.
        include: ``node0@node1:0,2-3``: only these hosts, or only these of their slots.
        exclude: the same, for what is to be left out.

    Raises:
        LaunchError: both are given, one names what there is not, or nothing is left.

    >>> hosts = [Host("node0", (0, 1)), Host("node1", (0, 1))]
    >>> selected(hosts, include="node1:1")
    [Host(name='node1', slots=(1,))]
    >>> selected(hosts, exclude="node1:0")
    [Host(name='node0', slots=(0, 1)), Host(name='node1', slots=(1,))]
    """
    if include and exclude:
        raise LaunchError(
            "`--include` and `--exclude` must not be given together; one says it all."
        )
    named = _parsed(include or exclude, {host.name: host for host in hosts})
    left = []
    for host in hosts:
        slots = named.get(host.name, ())
        if exclude:
            slots = tuple(slot for slot in host.slots if slot not in slots)
        elif not include:
            slots = host.slots
        if slots:
            left.append(Host(host.name, slots))
    if not left:
        raise LaunchError(
            f"at least one slot must be left, but `{include or exclude}` leaves none."
        )
    return left


def _parsed(text: str, hosts: Mapping[str, Host]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for part in filter(None, text.split("@")):
        name, colon, list_of_slots = part.partition(":")
        if name not in hosts:
            raise LaunchError(
                f"`{part}` must name a host of {', '.join(hosts)}, but {name!r} is none."
            )
        slots = _slots(list_of_slots, part) if colon else hosts[name].slots
        strange = [slot for slot in slots if slot not in hosts[name].slots]
        if strange:
            raise LaunchError(
                f"`{part}` must name slots of {name}, which has 0 to {hosts[name].slots[-1]}, but "
                f"names {strange[0]}."
            )
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), *slots)))
    return found


def _slots(text: str, part: str) -> tuple[int, ...]:
    slots: list[int] = []
    for each in text.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", each.strip())
        if ends is None:
            raise LaunchError(f"`{part}` must list slots as 0,2-3 after the colon.")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise LaunchError(f"`{part}` must list slots from low to high, but has {each.strip()}.")
        slots += range(first, last + 1)
    return tuple(dict.fromkeys(slots))

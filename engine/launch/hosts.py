"""Read hosts and their slots from a hostfile, and select the hosts and slots to use.

The hostfile and the ``--include`` and ``--exclude`` filters use DeepSpeed's formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import LaunchError

__all__ = ["Host", "limit_hosts", "parse_nnodes", "parse_nproc", "read_hostfile", "select_hosts"]

_LINE = re.compile(r"(?P<name>[^\s#]+)\s+slots\s*=\s*(?P<slots>-?\d+)\s*(?:#.*)?")


@dataclass(frozen=True)
class Host:
    """A host, and the slots to use on it.

    Each slot runs one process. On hosts with GPUs, each process uses its own GPU.

    >>> Host("node0", (0, 1, 3)).size
    3
    """

    name: str
    slots: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of processes to start on this host."""
        return len(self.slots)


def read_hostfile(path: Path) -> list[Host]:
    """Read a hostfile in DeepSpeed's format.

    Each line has the form ``host slots=N``. Comments start with ``#``.

    Raises:
        LaunchError: if a line is invalid, a host is repeated, or the file lists no hosts.
        OSError: if the file cannot be read.
    """
    hosts: dict[str, Host] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise LaunchError(
                f"{path}:{number}: invalid line {line.strip()!r}. Use the form `host slots=N`."
            )
        name, slots = found["name"], int(found["slots"])
        if slots < 1:
            raise LaunchError(
                f"{path}:{number}: {name} must have at least 1 slot, got {slots}. To exclude the "
                "host, delete this line."
            )
        if name in hosts:
            raise LaunchError(
                f"{path}:{number}: {name} is listed more than once. Combine its lines into one."
            )
        hosts[name] = Host(name, tuple(range(slots)))
    if not hosts:
        raise LaunchError(f"{path} lists no hosts. Add a line such as `node0 slots=2`.")
    return list(hosts.values())


def select_hosts(hosts: Sequence[Host], include: str = "", exclude: str = "") -> list[Host]:
    """Select hosts and slots with filters in DeepSpeed's format.

    Args:
        hosts: hosts to select from.
        include: hosts and slots to use; empty to use all. For example, ``node0@node1:0,2-3``
            selects all slots of node0, and slots 0, 2 and 3 of node1.
        exclude: hosts and slots not to use, in the same format.

    Raises:
        LaunchError: if both filters are given, a filter is invalid or names an unknown host or
            slot, or no slots are left.

    >>> hosts = [Host("node0", (0, 1)), Host("node1", (0, 1))]
    >>> select_hosts(hosts, include="node1:1")
    [Host(name='node1', slots=(1,))]
    >>> select_hosts(hosts, exclude="node1:0")
    [Host(name='node0', slots=(0, 1)), Host(name='node1', slots=(1,))]
    """
    if include and exclude:
        raise LaunchError("`--include` and `--exclude` cannot be combined. Use one of them.")
    named = _parse_filter(include or exclude, {host.name: host for host in hosts})
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
            f"The filter `{include or exclude}` leaves no slots. Change it to leave at least one "
            "slot."
        )
    return left


def limit_hosts(hosts: Sequence[Host], nnodes: int | None, nproc: str) -> tuple[Host, ...]:
    """Return the first ``nnodes`` hosts, each with its first ``nproc`` slots.

    Args:
        hosts: hosts to choose from.
        nnodes: number of hosts to use; None to use all.
        nproc: number of slots to use per host; ``auto`` to use all.

    Raises:
        LaunchError: if there are too few hosts, or a host has too few slots.
    """
    if nproc != "auto":
        size = parse_nproc(nproc)
        small = [host.name for host in hosts if host.size < size]
        if small:
            raise LaunchError(
                f"`--nproc` is {size}, but {small[0]} has fewer slots. Reduce `--nproc`, or "
                "exclude this host."
            )
        hosts = [Host(host.name, host.slots[:size]) for host in hosts]
    if nnodes is not None and nnodes > len(hosts):
        raise LaunchError(
            f"`--nnodes` is {nnodes}, but the number of available hosts is {len(hosts)}. Reduce "
            "`--nnodes`, or add hosts."
        )
    return tuple(hosts[:nnodes])


def parse_nnodes(text: str | None) -> tuple[int | None, int | None]:
    """Parse ``--nnodes``, which is a number of hosts or a range MIN:MAX.

    Returns:
        The minimum and the maximum number of hosts. For a single number, the minimum is None. If
        ``text`` is None, both are None.

    Raises:
        LaunchError: if the text is neither a number >= 1 nor a range with 1 <= MIN <= MAX.

    >>> parse_nnodes("2"), parse_nnodes("1:4"), parse_nnodes(None)
    ((None, 2), (1, 4), (None, None))
    """
    if text is None:
        return None, None
    low, colon, high = text.partition(":")
    if not low.isdecimal() or (colon and not high.isdecimal()) or int(low) < 1:
        raise LaunchError(f"`--nnodes` must be a number >= 1 or MIN:MAX, got {text!r}.")
    if colon and int(high) < int(low):
        raise LaunchError(f"`--nnodes` must be MIN:MAX with MIN <= MAX, got {text!r}.")
    return (int(low), int(high)) if colon else (None, int(low))


def parse_nproc(text: str) -> int:
    """Parse ``--nproc``, the number of processes per host.

    ``auto`` is the number of GPUs of this host, or 1 if it has no GPU.

    Raises:
        LaunchError: if the text is neither ``auto`` nor a number >= 1.
    """
    if text == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not text.isdecimal() or int(text) < 1:
        raise LaunchError(f"`--nproc` must be a number >= 1 or `auto`, got {text!r}.")
    return int(text)


def _parse_filter(text: str, hosts: Mapping[str, Host]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for part in filter(None, text.split("@")):
        name, colon, slots_text = part.partition(":")
        if name not in hosts:
            raise LaunchError(f"`{part}`: unknown host {name!r}. Use one of {', '.join(hosts)}.")
        slots = tuple(_parse_slots(slots_text, part)) if colon else hosts[name].slots
        unknown = [slot for slot in slots if slot not in hosts[name].slots]
        if unknown:
            raise LaunchError(
                f"`{part}`: {name} has no slot {unknown[0]}. Use slots from 0 to "
                f"{hosts[name].slots[-1]}."
            )
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), *slots)))
    return found


def _parse_slots(text: str, part: str) -> Iterator[int]:
    for each in text.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", each.strip())
        if ends is None:
            raise LaunchError(
                f"`{part}`: invalid slots. List the slots after the host name and a colon, for "
                "example `worker-1:0,2-3`."
            )
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise LaunchError(
                f"`{part}`: invalid range {each.strip()}. Put the lower slot first, for example "
                "`2-3`."
            )
        yield from range(first, last + 1)

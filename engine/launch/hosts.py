"""Read hosts and slots from a hostfile, and select the hosts and slots to use.

The hostfile and the ``--include`` and ``--exclude`` filters use DeepSpeed's formats. Hostfiles in
Open MPI's format are also accepted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import LaunchError

__all__ = ["Host", "limit_hosts", "parse_nnodes", "parse_nproc", "read_hostfile", "select_hosts"]

_LINE = re.compile(r"(?P<name>[^\s#]+)(?P<options>(?:\s+[\w-]+\s*=\s*-?\d+)*)\s*(?:#.*)?")
_OPTION = re.compile(r"([\w-]+)\s*=\s*(-?\d+)")
# ssh reads a name that starts with `-` as an option. `[` and `:` are for IPv6 addresses.
_NAME = re.compile(r"(?!.*@-)[\w\[:][\w.:%@\[\]-]*")


@dataclass(frozen=True)
class Host:
    """A host with its slots.

    Each slot runs one process. On hosts with GPUs, each process uses its own GPU.

    >>> Host("node0", (0, 1, 3)).size
    3
    """

    name: str
    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.count(":") == 1:
            raise LaunchError(
                f"Invalid host name {self.name!r}. Use a name such as `node0` or `user@node0`, or "
                "an IP address."
            )

    @property
    def size(self) -> int:
        """The number of processes to start on this host."""
        return len(self.slots)


def read_hostfile(path: Path, nproc: str = "auto") -> list[Host]:
    """Read a hostfile in the format of DeepSpeed or Open MPI.

    Each line has the form ``host slots=N``. ``slots=N`` can be omitted, and ``max_slots=N`` has no
    effect. Comments start with ``#``.

    Args:
        path: path of the hostfile.
        nproc: number of slots for hosts that do not set ``slots=N``; any value that `parse_nproc`
            accepts.

    Raises:
        LaunchError: if a line is invalid, a host is repeated, or the file lists no hosts.
        OSError: if the file cannot be read.
    """
    hosts: dict[str, Host] = {}
    default: int | None = None  # number of slots, counted once, and only if a line needs it
    # Editors on Windows write a byte order mark at the start of the file; `utf-8-sig` skips it.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            name, slots = _parse_line(line.strip())
            if slots is None:
                default = slots = default or parse_nproc(nproc)
            host = Host(name, tuple(range(slots)))
        except LaunchError as error:
            raise LaunchError(f"{path}:{number}: {error}") from None
        if host.name in hosts:
            raise LaunchError(
                f"{path}:{number}: {host.name} is listed more than once. Merge the lines."
            )
        hosts[host.name] = host
    if not hosts:
        raise LaunchError(f"{path} lists no hosts. Add a line such as `node0 slots=2`.")
    return list(hosts.values())


def _parse_line(line: str) -> tuple[str, int | None]:
    """Return the host name and the number of slots (None if omitted) from a hostfile line."""
    found = _LINE.fullmatch(line)
    options = dict(_OPTION.findall(found["options"])) if found else {}
    if found is None or not options.keys() <= {"slots", "max_slots", "max-slots"}:
        raise LaunchError(f"invalid line {line!r}. Use the form `host slots=N`.")
    slots = int(options["slots"]) if "slots" in options else None
    if slots is not None and slots < 1:
        raise LaunchError(
            f"{found['name']} must have at least 1 slot, got {slots}. To exclude the host, delete "
            "this line."
        )
    return found["name"], slots


def select_hosts(hosts: Sequence[Host], include: str = "", exclude: str = "") -> list[Host]:
    """Select hosts and slots with an include or exclude filter in DeepSpeed's format.

    Args:
        hosts: hosts to select from.
        include: hosts and slots to use; empty to use all. For example, ``node0@node1:0,2-3``
            selects all slots of node0, and slots 0, 2 and 3 of node1.
        exclude: hosts and slots not to use, in the format of ``include``.

    Raises:
        LaunchError: if both filters are given, or if the filter is invalid, contains an unknown
            host or slot, or leaves no slots.

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
            f"The filter `{include or exclude}` leaves no slots. Include more slots, or exclude "
            "fewer slots."
        )
    return left


def limit_hosts(hosts: Sequence[Host], nnodes: int | None, nproc: str) -> tuple[Host, ...]:
    """Return the first ``nnodes`` hosts, each with its first ``nproc`` slots.

    Args:
        hosts: hosts to choose from.
        nnodes: number of hosts to use; None to use all.
        nproc: number of slots to use per host; ``auto`` to use all.

    Raises:
        LaunchError: if fewer hosts are available than requested, or a host has too few slots.
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
            f"`--nnodes` must be <= the number of available hosts ({len(hosts)}), got {nnodes}. "
            "Reduce `--nnodes`, or add hosts."
        )
    return tuple(hosts[:nnodes])


def parse_nnodes(text: str | None) -> tuple[int | None, int | None]:
    """Parse ``--nnodes``: a number of hosts or a range MIN:MAX.

    Returns:
        The minimum and the maximum number of hosts. If ``text`` is a single number, the minimum is
        None. If ``text`` is None, both are None.

    Raises:
        LaunchError: if ``text`` is neither an integer >= 1 nor a range with 1 <= MIN <= MAX.

    >>> parse_nnodes("2"), parse_nnodes("1:4"), parse_nnodes(None)
    ((None, 2), (1, 4), (None, None))
    """
    if text is None:
        return None, None
    low, colon, high = text.partition(":")
    if not low.isdecimal() or (colon and not high.isdecimal()) or int(low) < 1:
        raise LaunchError(
            f"`--nnodes` must be an integer >= 1 or a range MIN:MAX, got {text!r}. Pass a value "
            "such as `2` or `1:4`."
        )
    if colon and int(high) < int(low):
        raise LaunchError(
            f"`--nnodes` must be MIN:MAX with MIN <= MAX, got {text!r}. Put the smaller number "
            "first."
        )
    return (int(low), int(high)) if colon else (None, int(low))


def parse_nproc(text: str) -> int:
    """Return the number of processes per host that ``--nproc`` requests.

    ``auto`` requests one process per GPU of this host, or one process if the host has no GPU. As in
    torchrun, ``gpu`` requests one process per GPU, and ``cpu`` one process per CPU.

    Raises:
        LaunchError: if ``text`` is neither one of these words nor an integer >= 1, or if ``text``
            is ``gpu`` on a host without a GPU.
    """
    if text in ("auto", "gpu"):
        import torch

        gpus = torch.cuda.device_count()
        if text == "gpu" and not gpus:
            raise LaunchError(
                "`--nproc gpu` requires a GPU, but this host has none. Set `--nproc` to a number."
            )
        return max(1, gpus)
    if text == "cpu":
        return os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise LaunchError(
            f"`--nproc` must be an integer >= 1, `auto`, `gpu` or `cpu`, got {text!r}. Use `auto` "
            "to start one process per GPU."
        )
    return int(text)


def _parse_filter(text: str, hosts: Mapping[str, Host]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for part in filter(None, text.split("@")):
        name, colon, slots_text = part.partition(":")
        if name not in hosts:
            raise LaunchError(
                f"The filter `{part}` names the unknown host {name!r}. Use one of "
                f"{', '.join(hosts)}."
            )
        slots = tuple(_parse_slots(slots_text, part)) if colon else hosts[name].slots
        unknown = [slot for slot in slots if slot not in hosts[name].slots]
        if unknown:
            raise LaunchError(
                f"The filter `{part}` names slot {unknown[0]}, which {name} does not have. Use one "
                f"of {', '.join(map(str, hosts[name].slots))}."
            )
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), *slots)))
    return found


def _parse_slots(text: str, part: str) -> Iterator[int]:
    for each in text.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", each.strip())
        if ends is None:
            raise LaunchError(
                f"The filter `{part}` contains invalid slots. List the slots after the host name "
                "and a colon, for example `worker-1:0,2-3`."
            )
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise LaunchError(
                f"The filter `{part}` contains the invalid range {each.strip()}. Put the lower "
                "slot first, for example `2-3`."
            )
        yield from range(first, last + 1)

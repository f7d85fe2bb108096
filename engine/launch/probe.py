"""Facts about the host that this runs on, printed as one line of JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from engine.versions import installed

__all__ = ["PACKAGES", "free_port", "probe"]

PACKAGES = ("onecycle", "torch", "deepspeed", "numpy")
_SIOCGIFADDR = 0x8915


def probe(config: str | None, port: int = 0) -> dict[str, Any]:
    """Return versions, the addresses of both ends of ssh, a free port and the hash of a config.

    Args:
        config: path of a file on this host; None: there is none.
        port: port that must be free, else it is None in the result; 0: any free port.
    """
    launcher, address = _read_ssh_endpoints()
    versions = {"python": platform.python_version()}
    versions |= {name: found for name in PACKAGES if (found := installed(name))}
    digest = None
    if config is not None:
        path = Path(config)
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
    return {
        "address": address,
        "launcher": launcher,
        "interface": _find_interface(address),
        "port": free_port(port),
        "versions": versions,
        "config": digest,
    }


def free_port(port: int = 0) -> int | None:
    """Return a port that is free on this host: the given one, or None if it is in use; 0: any."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does
        try:
            free.bind(("", port))
            free.listen()
        except OSError:
            return None
        bound: int = free.getsockname()[1]
        return bound


def _read_ssh_endpoints() -> tuple[str, str]:
    """Return the addresses of the ssh client and of this host; names can resolve to loopback."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return (connection[0], connection[2]) if len(connection) == 4 else ("127.0.0.1", "127.0.0.1")


def _find_interface(address: str) -> str | None:
    import fcntl  # not available on Windows, where `doctor` imports this module

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(query.fileno(), _SIOCGIFADDR, request)[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return None


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[2] if len(sys.argv) > 2 else None, int(sys.argv[1]))))

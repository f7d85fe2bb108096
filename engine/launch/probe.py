"""Print this host's network settings and package versions as JSON, for ``onecycle launch``."""

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

from engine.config.versions import get_installed_version

__all__ = ["PACKAGES", "find_free_port", "probe"]

PACKAGES = ("onecycle", "torch", "deepspeed", "numpy")
_SIOCGIFADDR = 0x8915


def probe(config: str | None, port: int = 0) -> dict[str, Any]:
    """Return the network settings and package versions of this host, and the hash of the config.

    The addresses of this host and of the launcher are read from the ssh connection.

    Args:
        config: path of the config on this host; None to omit the hash.
        port: port to check; 0 to choose a free port. The returned ``"port"`` is None if the given
            port is in use.
    """
    launcher, address = _read_ssh_endpoints()
    versions = {"python": platform.python_version()}
    versions |= {name: found for name in PACKAGES if (found := get_installed_version(name))}
    digest = None
    if config is not None:
        path = Path(config)
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
    return {
        "address": address,
        "launcher": launcher,
        "interface": _find_interface(address),
        "port": find_free_port(port),
        "versions": versions,
        "config": digest,
    }


def find_free_port(port: int = 0) -> int | None:
    """Return ``port`` if it is free, or None otherwise. If ``port`` is 0, return any free port."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TCPStore sets the same option
        try:
            free.bind(("", port))
            free.listen()
        except OSError:
            return None
        bound: int = free.getsockname()[1]
        return bound


def _read_ssh_endpoints() -> tuple[str, str]:
    """Return the IP addresses of the launcher (the ssh client) and of this host.

    The addresses are read from ``SSH_CONNECTION``, because host names may resolve to loopback
    addresses. Without an ssh connection, both addresses are 127.0.0.1.
    """
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return (connection[0], connection[2]) if len(connection) == 4 else ("127.0.0.1", "127.0.0.1")


def _find_interface(address: str) -> str | None:
    import fcntl  # fcntl does not exist on Windows, where `doctor` imports this module

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

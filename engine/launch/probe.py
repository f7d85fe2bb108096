"""What a host says of itself before anything is started on it, as one line of JSON."""

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
    """Return versions, the addresses of both ends of ssh, a free port, a config's hash.

    Args:
        config: a file, by its path here.
        port: the one that has to be free, which is None in the answer if it is not; 0: any.
    """
    launcher, address = _ends()
    versions = {"python": platform.python_version()}
    versions |= {name: found for name in PACKAGES if (found := installed(name))}
    digest = None
    if config is not None:
        path = Path(config)
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
    return {
        "address": address,
        "launcher": launcher,
        "interface": _interface(address),
        "port": free_port(port),
        "versions": versions,
        "config": digest,
        "hostname": socket.gethostname(),
    }


def free_port(wanted: int = 0) -> int | None:
    """Return a port that nothing on this machine listens at: the wanted one, if that is free."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does
        try:
            free.bind(("", wanted))
            free.listen()
        except OSError:
            return None
        port: int = free.getsockname()[1]
        return port


def _ends() -> tuple[str, str]:
    """Return the addresses that ssh came from and to; names may resolve to loopback."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return (connection[0], connection[2]) if len(connection) == 4 else ("127.0.0.1", "127.0.0.1")


def _interface(address: str) -> str | None:
    import fcntl  # not on Windows, where `doctor` reads this file all the same

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                asked = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(query.fileno(), _SIOCGIFADDR, asked)[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return None


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[2] if len(sys.argv) > 2 else None, int(sys.argv[1]))))

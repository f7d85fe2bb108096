"""Whether one host reaches another at the port where their ranks are to meet."""

from __future__ import annotations

import socket
import sys

__all__ = ["HELD", "dial", "hold"]

HELD = "held"
"""What the holder of a port prints once it can be dialled."""

_PATIENCE = 5.0


def hold(port: int) -> socket.socket:
    """Return a socket that others can connect to; nobody need accept them.

    Raises:
        OSError: the port is taken.
    """
    return socket.create_server(("", port), backlog=128)


def dial(address: str, port: int) -> str:
    """Return why a port cannot be connected to; nothing if it can.

    >>> with hold(0) as held:
    ...     dial("127.0.0.1", held.getsockname()[1])
    ''
    """
    try:
        socket.create_connection((address, port), timeout=_PATIENCE).close()
    except OSError as error:
        return str(error)
    return ""


def main() -> None:
    """Hold a port until the input ends (``PORT``), or dial one (``ADDRESS PORT``)."""
    *address, port = sys.argv[1:]
    if address:
        print(dial(address[0], int(port)))
        return
    with hold(int(port)):
        print(HELD, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()

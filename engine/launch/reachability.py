"""Check whether a host reaches the port of the rendezvous."""

from __future__ import annotations

import socket
import sys

__all__ = ["connect", "listen", "main"]

_TIMEOUT = 5.0


def listen(port: int) -> socket.socket:
    """Return a socket that others can connect to; connections need not be accepted.

    Raises:
        OSError: if the port is in use.
    """
    return socket.create_server(("", port), backlog=128)


def connect(address: str, port: int) -> str:
    """Return why a port cannot be reached; an empty string if it can.

    >>> with listen(0) as listener:
    ...     connect("127.0.0.1", listener.getsockname()[1])
    ''
    """
    try:
        socket.create_connection((address, port), timeout=_TIMEOUT).close()
    except OSError as error:
        return str(error)
    return ""


def main() -> None:
    """Listen on ``PORT`` until the input ends, or connect to ``ADDRESS PORT``."""
    *address, port = sys.argv[1:]
    if address:
        print(connect(address[0], int(port)))
        return
    with listen(int(port)):
        print("listening", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()

"""Check whether a host reaches the port of the rendezvous."""

from __future__ import annotations

import socket
import sys

__all__ = ["connect", "listen", "main"]

_TIMEOUT = 5.0


def listen(port: int) -> socket.socket:
    """Return a listening socket; clients can connect without `accept`.

    Raises:
        OSError: if the port is in use.
    """
    return socket.create_server(("", port), backlog=128)


def connect(address: str, port: int) -> str:
    """Connect to a port; return the error message, or an empty string on success.

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
    """Listen on ``PORT`` until standard input ends, or connect to ``ADDRESS PORT``."""
    *address, port = sys.argv[1:]
    if address:
        print(connect(address[0], int(port)))
        return
    with listen(int(port)):
        print("listening", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()

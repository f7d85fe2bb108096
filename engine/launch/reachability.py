"""Check whether a host can connect to the rendezvous port of another host."""

from __future__ import annotations

import select
import socket
import sys

__all__ = ["connect", "listen", "main"]

_TIMEOUT = 5.0
_BACKLOG = 1024


def listen(port: int) -> socket.socket:
    """Return a socket that listens on a port of this host.

    Raises:
        OSError: if the port is in use.
    """
    return socket.create_server(("", port), backlog=_BACKLOG)


def connect(address: str, port: int) -> str:
    """Connect to a port of a host. Return the error message, or an empty string on success.

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
    """Listen on a port of this host, or connect to a port of another host.

    With the command-line argument ``PORT``, listen until standard input is closed. With the
    arguments ``ADDRESS PORT``, connect and print the error message, if any.
    """
    *address, port = sys.argv[1:]
    if address:
        print(connect(address[0], int(port)))
        return
    with listen(int(port)) as listener:
        print("listening", flush=True)
        # Accept the connections: a host whose connection does not fit in the queue would time out.
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            listener.accept()[0].close()


if __name__ == "__main__":
    main()

"""Decide which requests the local server answers.

The server binds to 127.0.0.1, but other users of the machine and every page in the user's
browser can send requests to it. The path of each valid address therefore starts with a random
token. The server also checks the ``Host`` and ``Origin`` headers, to block requests from other
websites, including websites whose host name resolves to 127.0.0.1.
"""

from __future__ import annotations

import hmac
import secrets
from urllib.parse import urlsplit

from werkzeug.wrappers import Request, Response

__all__ = ["LOCAL_ADDRESS", "add_security_headers", "create_token", "find_refusal"]

LOCAL_ADDRESS = "127.0.0.1"
_LOCAL_NAMES = {LOCAL_ADDRESS, "localhost"}
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content Security Policy that forbids loading anything from other hosts. It allows inline styles,
because CodeMirror needs them."""


def create_token() -> str:
    """Return a random token to include in the server's URL."""
    return secrets.token_urlsafe(24)


def find_refusal(request: Request, token: str) -> tuple[int, str] | None:
    """Return the HTTP status and the reason if a request must be refused, and None otherwise.

    Any port is accepted in ``Host``, because a tunnel can forward another port to the server.
    """
    if _read_host_name(request.host) not in _LOCAL_NAMES:
        return 403, "The host of the address must be 127.0.0.1 or localhost."
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"http://{request.host}":
        return 403, "Requests from other websites are not allowed."
    given = request.path.removeprefix("/").partition("/")[0]
    if not hmac.compare_digest(given.encode(), token.encode()):
        return 404, "Not found. Open the address that `onecycle ui` printed."
    return None


def _read_host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def add_security_headers(response: Response) -> None:
    """Add headers so that a page cannot load files from other websites or be embedded in them."""
    response.headers["Content-Security-Policy"] = _CONTENT_POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers["Cache-Control"] = "no-store"

"""Local web server that checks each request, and then serves a file or runs an action."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from werkzeug.exceptions import HTTPException
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from engine.ui.access import LOCAL_ADDRESS, add_security_headers, create_token, find_refusal
from engine.ui.replies import Download, Numbers, build_response
from schedules.core.extras import MissingExtraError
from schedules.core.imports import imports_allowed

__all__ = ["Action", "Application", "Page", "start_server"]

log = logging.getLogger("onecycle")

_MAX_BODY = 8_000_000
"""Maximum size of a request body in bytes: enough for a few configs of at most 1 MB each."""
_MAX_PORT = 65535
_HERE = Path(__file__).parent
_STATIC = (_HERE / "static", _HERE.parent / "display" / "static")
_MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript"}

Action = Callable[[Mapping[str, Any]], Mapping[str, Any] | Numbers | Download]
"""Function that receives the JSON object in a request body and returns the reply."""


class Page(Protocol):
    """A web page: an HTML file, and the actions that its JavaScript can request."""

    html: str
    """Name of the HTML file."""

    @property
    def actions(self) -> Mapping[str, Action]:
        """Dict that maps the name of each action to the function that runs it."""
        ...


class Application:
    """WSGI application that serves one page. The page's address contains a random token.

    Args:
        page: page to serve.
        token: random token that the path of every request must start with.
    """

    def __init__(self, page: Page, token: str) -> None:
        self.token = token
        self._page = page
        self._files = {
            path.name: path
            for directory in _STATIC
            for path in directory.iterdir()
            if path.suffix in _MEDIA_TYPES
        }

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer a request."""
        request = Request(environ)
        request.max_content_length = _MAX_BODY
        response = self._respond(request)
        add_security_headers(response)
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        if refusal := find_refusal(request, self.token):
            return _build_error(*refusal)
        path = request.path.removeprefix(f"/{self.token}")
        try:
            if request.method == "POST" and path.startswith("/api/"):
                return self._act(request, path.removeprefix("/api/"))
            if request.method == "GET":
                return self._serve_file(self._page.html if path == "/" else path[1:])
        except HTTPException as error:
            return _build_error(error.code or 500, error.description or str(error))
        except (ValueError, OSError, MissingExtraError) as error:
            return _build_error(422, str(error))
        except Exception:  # the page shows the error and remains usable
            log.exception("request %s failed", path)
            return _build_error(500, "Internal error. See the terminal for details.")
        return _build_error(404, "Not found.")

    def _act(self, request: Request, name: str) -> Response:
        action = self._page.actions.get(name)
        if action is None:
            return _build_error(404, "Not found.")
        # A form of another website cannot send this content type.
        if request.mimetype != "application/json":
            return _build_error(415, "The content type must be application/json.")
        body = request.get_json()
        if not isinstance(body, dict):
            return _build_error(400, "The body must be a JSON object.")
        # The page may show a config of somebody else, whose code must not run.
        with imports_allowed(False):
            return build_response(action(body))

    def _serve_file(self, name: str) -> Response:
        path = self._files.get(name)
        if path is None:
            return _build_error(404, "Not found.")
        return Response(path.read_bytes(), mimetype=_MEDIA_TYPES[path.suffix])


def _build_error(status: int, message: str) -> Response:
    response = build_response({"error": message})
    response.status_code = status
    return response


class _SilentHandler(WSGIRequestHandler):
    """Request handler that does not log requests."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Suppress the log line for a request."""


def start_server(page: Page, port: int) -> tuple[BaseWSGIServer, str]:
    """Bind a server to 127.0.0.1, and return the server and the address of its page.

    Call ``serve_forever`` on the server to answer requests.

    Args:
        page: page to serve.
        port: port to use; 0 for any free port.

    Raises:
        ValueError: the port is out of range or not available.
    """
    if not 0 <= port <= _MAX_PORT:
        raise ValueError(
            f"`--port` must be between 0 and {_MAX_PORT}, got {port}. Use 0 for any free port."
        )
    application = Application(page, create_token())
    # werkzeug exits if it cannot bind the socket itself.
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((LOCAL_ADDRESS, port))
        except OSError as error:
            raise ValueError(
                f"Port {port} cannot be used: {error.strerror}. Choose another port with `--port`."
            ) from None
        bound.listen()
        server = make_server(
            LOCAL_ADDRESS,
            port,
            application,
            threaded=True,
            request_handler=_SilentHandler,
            fd=bound.fileno(),
        )
    return server, f"http://{LOCAL_ADDRESS}:{server.port}/{application.token}/"

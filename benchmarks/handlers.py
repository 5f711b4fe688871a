"""Django's own handlers without sockets: one request after the other through WSGIHandler's or ASGIHandler's middleware chain.

What is timed begins with a new request object and ends with the response, so that it is all that a server would call but for
its own reading and writing.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

from django.core.handlers.asgi import ASGIHandler, ASGIRequest
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
from django.test import override_settings

from .room import Awork, Work
from .settings import OURS
from .site import alone

_made: dict[tuple[bool, bool], Any] = {}


def handler(is_async: bool, middleware: bool) -> Any:
    """Django's own, with our middleware or with none."""
    made = _made.get((is_async, middleware))
    if made is None:
        with override_settings(MIDDLEWARE=[OURS] if middleware else []):
            made = _made[(is_async, middleware)] = ASGIHandler() if is_async else WSGIHandler()
    return made


def environ(path: str) -> dict[str, Any]:
    """A request as a WSGI server with threads hands it over."""
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_NAME": "testserver",
        "SERVER_PORT": "80",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "testserver",
        "HTTP_ACCEPT": "*/*",
        "HTTP_USER_AGENT": "benchmarks",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": BytesIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }


def scope(path: str) -> dict[str, Any]:
    """A request as an ASGI server hands it over."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("testserver", 80),
        "client": ("127.0.0.1", 50_000),
        "headers": [(b"host", b"testserver"), (b"accept", b"*/*"), (b"user-agent", b"benchmarks")],
    }


def requests(path: str, middleware: bool, status: int = 200) -> Work:
    """So many requests for a path, through a WSGI handler with our middleware or with none."""
    respond, template, urlconf = handler(False, middleware).get_response, environ(path), alone(path.strip("/"))

    def work(calls: int) -> None:
        for _ in range(calls):
            request = WSGIRequest(dict(template))
            request.urlconf = urlconf
            response = respond(request)
            if response.status_code != status:
                raise AssertionError(f"{path} answered {response.status_code}: {response.content!r}")

    return work


def arequests(path: str, middleware: bool, status: int = 200) -> Awork:
    """The same through an ASGI handler, on the loop that runs."""
    respond, template, urlconf = handler(True, middleware).get_response_async, scope(path), alone(path.strip("/"))

    async def work(calls: int) -> None:
        for _ in range(calls):
            request = ASGIRequest(dict(template), BytesIO())
            request.urlconf = urlconf
            response = await respond(request)
            if response.status_code != status:
                raise AssertionError(f"{path} answered {response.status_code}: {response.content!r}")

    return work

"""The access log: one line per request; all log lines of a request contain its id.

This is the outermost middleware, so that refused requests are logged too. Queries and bodies are never logged, because
clients may put anything into them. Successful probes and scrapes are logged at the debug level.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from structlog.contextvars import bind_contextvars, clear_contextvars

from followups.telemetry import traces
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"

SAFE_ID = re.compile(rb"[\w.:+/=@-]{1,128}", re.ASCII)
"""Pattern of the request ids that are accepted from a client or a proxy.

A request id that does not match this pattern is replaced by a new one.
"""

LONGEST_PATH = 200
"""Maximum length of a path in a log line, in characters. The API's own paths have at most 80 characters."""

FAILED = HTTPStatus.INTERNAL_SERVER_ERROR
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})

SECURITY_HEADERS = {"x-content-type-options": "nosniff"}
"""The headers that every response has.

Static files may be cached and set their own `cache-control`. Responses other than static files may not be cached.
"""

KEY = "followups.seen"
"""The key of the `RequestRecord` in a request's ASGI scope."""

log = get_logger(__name__)


@dataclass(slots=True)
class RequestRecord:
    """The request data that the access log records.

    ``status`` is None if the client disconnected before the response.
    """

    request_id: str
    status: int | None = None
    workspace_id: str | None = None
    key_id: str | None = None


class Access:
    """The ASGI middleware that writes the access log."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap the application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request with its id in the log context; log the request after its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        seen = RequestRecord(request_id_of(scope["headers"]))
        inner = {**scope, KEY: seen}
        if scope["method"] == "HEAD":  # HEAD is served as GET; the server omits the body
            inner["method"] = "GET"
        # On a keep-alive connection, a request's task inherits the log context of the previous request. The log context
        # is therefore cleared before each request.
        clear_contextvars()
        bind_contextvars(request_id=seen.request_id, method=scope["method"], path=scope["path"][:LONGEST_PATH])

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                # an enum member would be logged by its name instead of its number
                seen.status = int(message["status"])
                headers = MutableHeaders(scope=message)
                headers[HEADER] = seen.request_id
                headers.update(SECURITY_HEADERS)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            with _span(scope) as set_attributes:
                if traceparent := traces.current_traceparent():
                    bind_contextvars(trace_id=traceparent.split("-")[1])
                await self._app(inner, receive, answer)
                set_attributes(_attributes(inner, seen), failed=seen.status is None or seen.status >= FAILED)
        finally:
            _log_request(seen, scope, time.perf_counter() - started)
            clear_contextvars()


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the safe request id in the headers, or else a new id.

    >>> request_id_of([(b"x-request-id", b"abc-1")])
    'abc-1'
    >>> len(request_id_of([(b"x-request-id", b"<script>")]))
    32
    """
    given = next((value for name, value in headers if name == HEADER.encode()), b"")
    return given.decode() if SAFE_ID.fullmatch(given) else uuid4().hex


def _span(scope: Scope) -> AbstractContextManager[traces.Note]:
    return traces.NOTHING if scope["path"] in PROBES else traces.request(scope["method"], scope["headers"])


def _attributes(scope: Scope, seen: RequestRecord) -> dict[str, str | int]:
    found = {
        "http.response.status_code": seen.status,
        "http.route": getattr(scope.get("route"), "path", None),
        "followups.workspace_id": seen.workspace_id,
        "followups.request_id": seen.request_id,
    }
    return {name: value for name, value in found.items() if value is not None}


def _log_request(seen: RequestRecord, scope: Scope, seconds: float) -> None:
    failed = seen.status is not None and seen.status >= FAILED
    if scope["path"] in PROBES:  # probes are frequent, and the response of a failing probe explains the failure
        tell = log.debug if seen.status == HTTPStatus.OK else log.info
    else:
        tell = log.warning if failed else log.info
    tell(
        "request",
        status=seen.status,
        duration_ms=round(seconds * 1000, 2),
        client=(scope.get("client") or (None,))[0],
        workspace_id=seen.workspace_id,
        key_id=seen.key_id,
    )

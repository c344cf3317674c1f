"""The console's ASGI application: finds the route, and checks origin, session and permission."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.to_thread
from sqlalchemy.exc import DBAPIError
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import Response, StreamingResponse
from starlette.routing import compile_path
from structlog.contextvars import bind_contextvars

from followups.console import access, identity, language
from followups.console.access import Permission
from followups.console.assets import HEADERS
from followups.console.live import Live, Stream
from followups.console.pages import ROUTES
from followups.console.services import PREFIX, ConsoleServices
from followups.console.visit import Fields, ForbiddenError, Visit
from followups.database_errors import is_passing, is_undone
from followups.errors import InvalidRequestError, NotFoundError
from followups.store import follow_ups
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    import re
    from collections.abc import Callable
    from uuid import UUID

    from starlette.types import Receive, Scope, Send

    from followups.console.pages import Route
    from followups.settings import Settings

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

THREADS = 6
"""Maximum number of console requests served at a time. API requests have a separate limit."""

STRANGERS_BODY = 16 * 1024
"""Maximum size, in bytes, of a request body that is sent without a valid session.

Only the sign-in form is sent without a session.
"""

PUBLIC_FORM = 1024
"""Maximum size, in bytes, of a form that is parsed without a valid session.

A sign-in form contains the page to open next, and either an API key or a link's token.
"""

STREAM = f"{PREFIX}/stream"
"""Path of the server-sent event stream."""

LONGEST_BODY = 1024 * 1024

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Matched:
    """The routes of one path."""

    pattern: re.Pattern[str]
    by_method: dict[str, Route]


class Console:
    """The console, an ASGI application for the paths under ``/console``."""

    def __init__(self, settings: Settings, nudge: Callable[[], None]) -> None:
        """Store the settings and ``nudge``, a function that makes the workers run a tick."""
        self.services = ConsoleServices(settings, nudge)
        self._limiter = anyio.CapacityLimiter(THREADS)
        self._live = Live(self.services.engine, self._in_thread)
        self._table: list[Matched] = []
        for path in dict.fromkeys(route.path for route in ROUTES):
            routes = {route.method: route for route in ROUTES if route.path == path}
            self._table.append(Matched(compile_path(path)[0], routes))

    def close(self) -> None:
        """Close the database connections."""
        self.services.close()

    async def body_limit(self, scope: Scope) -> int:
        """Return the maximum size of a body in bytes; without a valid session it is smaller."""
        if scope["method"] in {"GET", "HEAD"}:
            return STRANGERS_BODY
        known = await self._in_thread(identity.is_known, self.services, _cookies(scope), scope["scheme"])
        return LONGEST_BODY if known else STRANGERS_BODY

    def end_streams(self) -> None:
        """End the open event streams within a second, because the process is stopping.

        This method may be called from a signal handler.
        """
        self._live.end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        streams = scope["path"] == STREAM and scope["method"] == "GET"
        response = await (self._stream(scope) if streams else self._respond(scope, receive))
        await response(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        path = scope["path"].removeprefix(PREFIX) or "/"
        visit = _visit(self.services, scope, path)
        matched = next((each for each in self._table if each.pattern.match(path)), None)
        route = matched.by_method.get(visit.method) if matched else None
        if matched and route is None:
            allowed = sorted(matched.by_method)
            response = visit.page("message.html", HTTPStatus.METHOD_NOT_ALLOWED, title=visit.t("Not possible"))
            response.headers["allow"] = ", ".join(allowed)
            return _finished(visit, response)
        if matched and (found := matched.pattern.match(path)):
            visit.parameters = found.groupdict()
        body = b"" if visit.method == "GET" else (await receive()).get("body", b"")
        return await self._in_thread(self._serve, visit, route, scope, body)

    async def _stream(self, scope: Scope) -> Response:
        """Return a stream of change events for the person who is signed in."""
        visit = _visit(self.services, scope, STREAM.removeprefix(PREFIX))
        try:
            visit.query = _query(scope)
        except InvalidRequestError:
            return _finished(visit, Response(status_code=HTTPStatus.UNPROCESSABLE_ENTITY))
        await self._in_thread(identity.identify, visit, scope)
        viewer = visit.viewer
        if viewer is None:
            return _finished(visit, Response(status_code=HTTPStatus.UNAUTHORIZED))
        if not self._live.has_room(viewer.session.id, viewer.workspace_id):
            return _finished(visit, Response(status_code=HTTPStatus.TOO_MANY_REQUESTS, headers={"retry-after": "30"}))

        async def still_valid() -> bool:
            return await self._in_thread(identity.is_known, self.services, visit.cookies, visit.scheme)

        follow_up_id = await self._in_thread(_followed, visit)
        stream = Stream(viewer.session.id, viewer.workspace_id, follow_up_id)
        # A proxy that buffers the response would delay small events indefinitely.
        headers = {"x-accel-buffering": "no", "cache-control": "no-store"}
        events = self._live.events(stream, still_valid)
        return _finished(visit, StreamingResponse(events, media_type="text/event-stream", headers=headers))

    async def _in_thread(self, work: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
        return await anyio.to_thread.run_sync(work, *arguments, limiter=self._limiter)

    def _serve(self, visit: Visit, route: Route | None, scope: Scope, body: bytes) -> Response:
        """Return the route's response, or an error page if the route fails."""
        try:
            return _finished(visit, self._decide(visit, route, scope, body))
        except ForbiddenError:
            told = visit.t("Your role does not allow this.")
            return _finished(visit, _message_page(visit, HTTPStatus.FORBIDDEN, told))
        except NotFoundError:
            return _finished(
                visit, _message_page(visit, HTTPStatus.NOT_FOUND, visit.t("There is nothing at this address."))
            )
        except InvalidRequestError as error:
            return _finished(visit, _message_page(visit, HTTPStatus.UNPROCESSABLE_ENTITY, visit.said(error.sentence)))
        except DBAPIError as error:
            if not is_passing(error):
                raise
            log.warning("database_unavailable", error=type(error.orig).__name__)
            told = visit.t("The database cannot be reached at this moment; try again shortly.")
            response = _message_page(visit, HTTPStatus.SERVICE_UNAVAILABLE, told)
            response.headers["retry-after"] = "5"
            return _finished(visit, response)

    def _decide(self, visit: Visit, route: Route | None, scope: Scope, body: bytes) -> Response:
        """Check origin, session and role, in this order; then call the route."""
        if visit.method != "GET":
            public = self.services.settings.public_url
            own = access.own_origin(public, scope["scheme"], visit.headers.get("host", ""))
            if refused := access.origin_refusal(visit.headers, own, configured=public is not None):
                log.warning("console_origin_refused", own=own)
                return _message_page(visit, HTTPStatus.FORBIDDEN, visit.said(refused))
        if route is None or route.action is not Permission.PUBLIC or route.path == "/login":
            identity.identify(visit, scope)
        if route is not None and route.action is Permission.PUBLIC:
            return _public_page(visit, route, scope, body)
        if visit.viewer is None:
            return identity.ask_to_sign_in(visit)
        bind_contextvars(console_session=str(visit.viewer.session.id))
        if route is None:
            raise NotFoundError
        if not visit.viewer.may(route.action):
            raise ForbiddenError
        _parse(visit, scope, body)
        try:
            return route.page(visit)
        except DBAPIError as error:
            if not is_undone(error):
                raise
            # A conflict has rolled back the transaction, so the route can safely run again.
            return route.page(visit)


def _followed(visit: Visit) -> UUID | None:
    """Return the stream's follow-up, or None if the person may not see it."""
    asked = visit.query.uuid("follow_up")
    if asked is None:
        return None
    with visit.transaction() as session:
        found = follow_ups.find(session, asked, visit.person.workspace_id)
        return asked if found and visit.person.sees(found.workspace_id, found.chat_id) else None


def _message_page(visit: Visit, status: int, told: str) -> Response:
    titles = {403: "Not allowed", 404: "Not found", 413: "Not possible", 422: "Not possible", 503: "Not available"}
    return visit.page("message.html", status, title=visit.t(titles[status]), told=told)


def _finished(visit: Visit, response: Response) -> Response:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    for name, value, options in visit.set_cookies:
        response.set_cookie(name, value, **options)
    return response


def _cookies(scope: Scope) -> dict[str, str]:
    return cookie_parser(Headers(scope=scope).get("cookie", ""))


def _public_page(visit: Visit, route: Route, scope: Scope, body: bytes) -> Response:
    if len(body) > PUBLIC_FORM:
        told = visit.t("The form must have at most {number} bytes.", number=f"{PUBLIC_FORM:,}")
        return _message_page(visit, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, told)
    _parse(visit, scope, body)
    return route.page(visit)


def _query(scope: Scope) -> Fields:
    """Return the fields of the query string. Raises `InvalidRequestError`."""
    return Fields(scope["query_string"].decode("ascii", errors="replace"))


def _parse(visit: Visit, scope: Scope, body: bytes) -> None:
    """Parse the query string and the form. Raises `InvalidRequestError`."""
    visit.query = _query(scope)
    visit.form = Fields(body.decode("ascii", errors="replace"))


def _visit(services: ConsoleServices, scope: Scope, path: str) -> Visit:
    headers = Headers(scope=scope)
    cookies = _cookies(scope)
    chosen = cookies.get("followups_language", "")
    return Visit(
        services=services,
        method=scope["method"],
        path=path,
        parameters={},
        query=Fields(""),
        form=Fields(""),
        headers=headers,
        cookies=cookies,
        client=(scope.get("client") or ("",))[0],
        scheme=scope["scheme"],
        language=chosen if chosen in language.LANGUAGES else language.preferred(headers.get("accept-language", "")),
    )

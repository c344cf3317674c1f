"""The gate checks the API key, limits the request body, and turns errors into responses.

The key is checked first, so the body of an unauthenticated request is never read. The whole body is read before any
other component handles the request. A slow client therefore occupies a socket, but no thread and no database
connection. Requests outside the API and the console need no key and have no body. Probes and scrapes share a recent
result, and the documentation is kept in memory.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING

from followups.api import problems
from followups.api.authentication import IDENTITY, admit
from followups.errors import FollowUpsError, TooManyRequestsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from followups.api.request_limits import RequestLimit
    from followups.console.application import Console

KEYED = "/api/"
"""Path prefix of requests that need an API key."""

CONSOLE = "/console"
"""Path of the console, whose users are identified by a cookie."""

MAX_HEADER_SIZE = 32 * 1024
"""Maximum size of a request line together with its headers, in bytes."""

MAX_BODY_SIZE = 1024 * 1024
"""Maximum size of a body, in bytes.

The longest message has 65,536 characters. Escaped as surrogate pairs, the longest message takes 786,432 bytes of JSON.
"""

BODY_WITHIN = 20.0
"""Time limit for the whole body to arrive, in seconds. To send 1 MiB in time, a client needs 52 kB/s."""

MAX_BUFFERED = 32 * 1024 * 1024
"""Maximum total size in bytes of all request bodies in memory, including incomplete ones."""

MAX_WAITING = 256
"""Maximum number of API requests that are running or waiting.

Further requests are refused immediately, with a Retry-After header.
"""

MAX_CONSOLE_WAITING = 32
"""Maximum number of running and waiting console requests: five for each console thread.

Console requests do not use the API's slots.
"""


WIRE = "followups.wire"
"""The ASGI scope's key for the request's `RequestBody`."""


AT_MOST_ONCE = (b"host", b"authorization", b"idempotency-key", b"content-type", b"content-encoding")
"""Headers that may occur only once in a request."""


class Budget:
    """The memory shared by all request bodies. Memory for a body is reserved until its request is answered."""

    def __init__(self) -> None:
        """Start with no memory reserved."""
        self.taken = 0


@dataclass(slots=True)
class RequestBody:
    """A request body that is still arriving, its reserved memory, and any error found."""

    budget: Budget
    most: int = MAX_BODY_SIZE
    size: int = 0
    owner: RequestLimit | None = None
    """The workspace to which this body's memory is charged, or None without a valid API key."""
    problem: problems.ProblemAnswer | None = None

    def take(self, size: int) -> problems.ProblemAnswer | None:
        """Reserve memory for a chunk of the body.

        Return an error response if this body, or all bodies together, would become too large.
        """
        if self.size + size > self.most:
            return TOO_LARGE
        if self.budget.taken + size > MAX_BUFFERED:
            return _NO_ROOM
        if self.owner is not None:
            if self.owner.buffered + size > MAX_BUFFERED // 2:
                return _NO_ROOM
            self.owner.buffered += size
        self.budget.taken += size
        self.size += size
        return None

    def charge(self, owner: RequestLimit) -> None:
        """Count the body's memory against its workspace, which may use at most half of the shared memory."""
        self.owner = owner
        owner.buffered += self.size

    def release(self) -> None:
        """Release all memory reserved for the request's body."""
        if self.owner is not None:
            self.owner.buffered -= self.size
        self.budget.taken -= self.size
        self.size = 0


class Refusal(Exception):  # noqa: N818 - no error of ours, the client's
    """Raised to refuse a request with an RFC 9457 error response."""

    def __init__(self, problem: problems.ProblemAnswer) -> None:
        """Store the error response."""
        super().__init__(problem.detail)
        self.problem = problem


class ClientDisconnected(Exception):  # noqa: N818 - no error of ours, the client's
    """The client has disconnected, so no response can reach it."""


@dataclass(slots=True)
class RequestSlots:
    """The number of requests that are running or waiting.

    One instance counts the requests to the console, and another counts all other requests.
    """

    taken: int = 0

    def acquire(self, most: int, full: problems.ProblemAnswer) -> None:
        """Count a request. Raises `Refusal` if ``most`` requests are already counted."""
        if self.taken >= most:
            raise Refusal(full)
        self.taken += 1

    def release(self) -> None:
        """Stop counting a request once its response has started, so that slow readers occupy no slot."""
        self.taken -= 1


class Gate:
    """The ASGI middleware that admits or refuses every request."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap the application."""
        self._app = app
        self._slots = RequestSlots()
        self._console_slots = RequestSlots()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the application, or answer it with an error response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        wire: RequestBody = scope[WIRE]
        try:
            _check_head(scope)
            if scope["path"].startswith(KEYED):
                await _admit(scope)
                await self._serve_api(scope, receive, answer)
                return
            await scope["app"].state.services.request_limits.throttle()
            console = getattr(scope["app"].state, "console", None) if scope["path"].startswith(CONSOLE) else None
            if console:
                await self._serve_console(console, scope, receive, answer)
            else:
                answer.closes = _has_body(scope)
                await self._app(scope, _replay(b"", receive), answer)
        # both errors are raised only before a response has started
        except Refusal as refusal:
            await answer.problem(scope, receive, refusal.problem)
        except TooManyRequestsError as error:
            await answer.problem(scope, receive, problems.of_error(error))
        except ClientDisconnected:
            return
        except Exception as error:  # noqa: BLE001 - the last resort: no stack trace leaves the process
            if not answer.begun:
                await answer.problem(scope, receive, problems.of_exception(error))
        finally:
            wire.release()

    async def _serve_api(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        wire: RequestBody = scope[WIRE]
        limit: RequestLimit = scope["app"].state.services.request_limits.of(scope[IDENTITY].workspace_id)
        wire.charge(limit)
        body = await _read_body(receive, wire)
        # the workspace's limit comes before the shared slot, so that one workspace cannot take every slot
        await limit.acquire()
        try:
            self._slots.acquire(MAX_WAITING, _FULL)
        except Refusal:
            limit.release()
            raise

        def release() -> None:
            limit.release()
            self._slots.release()

        await self._let_in(release, scope, _replay(body, receive), answer)

    async def _serve_console(self, console: Console, scope: Scope, receive: Receive, answer: _Answer) -> None:
        wire: RequestBody = scope[WIRE]
        self._console_slots.acquire(MAX_CONSOLE_WAITING, _CONSOLE_FULL)
        try:
            wire.most = await console.body_limit(scope)
        finally:
            self._console_slots.release()  # a request does not occupy a slot while its body is still arriving
        body = await _read_body(receive, wire)
        self._console_slots.acquire(MAX_CONSOLE_WAITING, _CONSOLE_FULL)
        await self._let_in(self._console_slots.release, scope, _replay(body, receive), answer)

    async def _let_in(self, release: Callable[[], None], scope: Scope, receive: Receive, answer: _Answer) -> None:
        answer.at_start = release
        try:
            await self._app(scope, receive, answer)
        finally:
            if not answer.begun:
                answer.at_start = None
                release()


class _Answer:
    """Sends the response and records whether it has started. A response that has started cannot be replaced."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False
        self.closes = False
        """Whether the response closes the connection because part of the request's body was not read."""
        self.at_start: Callable[[], None] | None = None

    async def __call__(self, message: Message) -> None:
        if not self.begun:
            self.begun = True
            if self.at_start:
                self.at_start()
            if self.closes:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await self._send(message)

    async def problem(self, scope: Scope, receive: Receive, problem: problems.ProblemAnswer) -> None:
        await problem.response()(scope, receive, self)


def _check_head(scope: Scope) -> None:
    # The limit in `LimitedProtocol` does not count the slice in which the headers end.
    target = len(scope["raw_path"]) + len(scope["query_string"])
    if target + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_SIZE:
        raise Refusal(TOO_LONG_A_HEADER)
    headers = dict(scope["headers"])
    if scope["http_version"] not in {"1.0", "1.1"}:
        raise Refusal(malformed("The server supports only HTTP/1.1 and HTTP/1.0."))
    if b"host" not in headers and scope["http_version"] == "1.1":  # RFC 9112, 3.2
        raise Refusal(malformed("A request must have a Host header."))
    if len(headers) < len(scope["headers"]) and (repeated := _repeated(scope)):
        raise Refusal(malformed(f"A request must have at most one {repeated} header."))
    if headers.get(b"transfer-encoding", b"chunked").strip().lower() != b"chunked":
        raise Refusal(malformed("The only supported Transfer-Encoding is chunked."))
    if b"transfer-encoding" in headers and scope["http_version"] == "1.0":  # RFC 9112, 6.1
        raise Refusal(malformed("An HTTP/1.0 request must not have a Transfer-Encoding."))
    # the server has already checked that the value is a number
    if int(headers.get(b"content-length", b"0")) > MAX_BODY_SIZE:
        raise Refusal(TOO_LARGE)
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in {b"", b"identity"}:
        raise Refusal(_COMPRESSED)


def _repeated(scope: Scope) -> str | None:
    """Return the name of a header that is repeated although it may occur only once.

    If a header is repeated, two servers could interpret the request differently.
    """
    names = [name for name, _ in scope["headers"]]
    return next((name.decode() for name in AT_MOST_ONCE if names.count(name) > 1), None)


async def _admit(scope: Scope) -> None:
    try:
        await admit(scope)
    except FollowUpsError as error:
        problem = problems.of_error(error)
        raise Refusal(replace(problem, headers={**problem.headers, **(_CLOSE if _has_body(scope) else {})})) from None


def _has_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in scope["headers"]
    )


async def _read_body(receive: Receive, wire: RequestBody) -> bytes:
    chunks: list[bytes] = []
    more = True
    try:
        async with asyncio.timeout(BODY_WITHIN):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                if wire.problem or wire.size > wire.most:
                    raise Refusal(wire.problem or TOO_LARGE)
                chunks.append(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refusal(_TOO_SLOW) from None
    return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    told = False

    async def next_message() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def malformed(detail: str) -> problems.ProblemAnswer:
    """Return the error response for a request that is not HTTP/1.1."""
    return problems.of_status(HTTPStatus.BAD_REQUEST, detail, _CLOSE)


# The rest of the request's body has not been read. The connection therefore cannot be reused.
_CLOSE = {"connection": "close"}
TOO_LONG_A_HEADER = problems.of_status(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"The header must have at most {MAX_HEADER_SIZE:,} bytes.", _CLOSE
)
TOO_LARGE = problems.of_status(
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body must have at most {MAX_BODY_SIZE:,} bytes.", _CLOSE
)
_COMPRESSED = problems.of_status(
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "The body is compressed (Content-Encoding); send it uncompressed.",
    {**_CLOSE, "accept-encoding": "identity"},
)
_FULL = problems.of_status(
    HTTPStatus.SERVICE_UNAVAILABLE, "Too many requests are waiting; try again shortly.", {"retry-after": "1"}
)
# because the refused request's body may still be unread
_CONSOLE_FULL = replace(_FULL, headers={**_CLOSE, **_FULL.headers})
_NO_ROOM = problems.of_status(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "Too many large request bodies are being received; try again shortly.",
    {**_CLOSE, "retry-after": "1"},
)
_TOO_SLOW = problems.of_status(
    HTTPStatus.REQUEST_TIMEOUT, f"The body did not arrive within {BODY_WITHIN:g} seconds.", _CLOSE
)

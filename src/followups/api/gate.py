"""The outermost layer: takes in each request's body within limits of size and time, and lets no error out bare.

The body is complete before anything behind is troubled with the request, so that a slow client holds a
socket and nothing else: no thread, no database connection.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from followups.api import problems

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_HEADER_SIZE = 32 * 1024
"""Bytes of a request line and its headers together."""

MAX_BODY_SIZE = 1024 * 1024
"""Bytes. The longest message, 65,536 characters, takes 786,432 when JSON escapes each as a surrogate pair."""

BODY_WITHIN = 20.0
"""Seconds until the whole body must be here: 1 MiB at 52 kB/s."""

MAX_WAITING = 256
"""Requests inside at once; more are told to come back, sooner than the last of them would be served."""


class Refusal(Exception):  # noqa: N818 - no error of ours, the client's
    """The request goes no further."""

    def __init__(self, problem: problems.ProblemAnswer) -> None:
        """Take what is told."""
        super().__init__(problem.detail)
        self.problem = problem


class Gone(Exception):  # noqa: N818 - no error of ours, the client's
    """The client has gone; nobody reads an answer."""


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        """Take the application behind."""
        self._app = app
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            body = await _read_body(scope, receive)
            await self._let_in(scope, _replay(body, receive), answer)
        except Refusal as refusal:
            await answer.problem(scope, receive, refusal.problem)  # all are raised before an answer begins
        except Gone:
            return
        except Exception as error:  # noqa: BLE001 - the last resort: no stack trace leaves the process
            if not answer.begun:
                await answer.problem(scope, receive, problems.of_exception(error))

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._inside >= MAX_WAITING:
            detail = "Too many requests are waiting; try again shortly."
            raise Refusal(problems.of_status(HTTPStatus.SERVICE_UNAVAILABLE, detail, {"retry-after": "1"}))
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1


class _Answer:
    """Sends, and remembers whether the answer has begun: after that none can take its place."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def __call__(self, message: Message) -> None:
        self.begun = True
        await self._send(message)

    async def problem(self, scope: Scope, receive: Receive, problem: problems.ProblemAnswer) -> None:
        await problem.response()(scope, receive, self)


async def _read_body(scope: Scope, receive: Receive) -> bytes:
    # The server counts only what comes in pieces.
    if len(scope["query_string"]) + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_SIZE:
        raise Refusal(TOO_LONG_A_HEADER)
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if int(declared) > MAX_BODY_SIZE:  # the server has checked that it is a number
        raise Refusal(_TOO_LARGE)
    chunks: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(BODY_WITHIN):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                chunk = message.get("body", b"")
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_BODY_SIZE:
                    raise Refusal(_TOO_LARGE)
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


# What is left of the body is not read, so the connection cannot carry another request.
_CLOSE = {"connection": "close"}
TOO_LONG_A_HEADER = problems.of_status(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"The header must have at most {MAX_HEADER_SIZE:,} bytes.", _CLOSE
)
_TOO_LARGE = problems.of_status(
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body must have at most {MAX_BODY_SIZE:,} bytes.", _CLOSE
)
_TOO_SLOW = problems.of_status(
    HTTPStatus.REQUEST_TIMEOUT, f"The body did not arrive within {BODY_WITHIN:g} seconds.", _CLOSE
)

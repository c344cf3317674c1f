"""Serves the application with uvicorn, and bounds what a connection may cost before, between and after its requests."""

from __future__ import annotations

import sys
from enum import Enum
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from followups.api import problems
from followups.api.access_log import SECURITY_HEADERS
from followups.api.gate import MAX_HEADER_SIZE, TOO_LARGE, TOO_LONG_A_HEADER, WIRE, Budget, RequestBody, malformed
from followups.api.listening import plain

if TYPE_CHECKING:
    import asyncio
    import socket

    from starlette.types import ASGIApp

PEER = "peer"
"""Key of the address that is connected to this process in a request's state, whatever its headers say."""

HEADER_WITHIN = 10.0
"""Seconds for the headers to arrive."""

MAX_WIRE_SIZE = 1024 * 1024 * 5 // 4
"""Most bytes of a body as sent: the largest body, and a quarter for its chunks. A chunk of one byte has six."""

MAX_PIPELINED = 16
"""Most requests that may wait on a connection for the one before them to be answered."""

MAX_CONNECTIONS = 2_000
"""Maximum number of open connections.

Beyond it, the connection that has been idle longest is closed, or else the one whose client has not read for longest,
or the new one if there is neither.
"""

READ_WITHIN = 20.0
LEAST_READ = 64 * 1024
"""A client must read at least that many bytes of its answer, or the rest of it, within that many seconds."""

MAX_UNSENT = 32 * 1024 * 1024
"""Most bytes of answers that wait for their clients to read. Beyond it, the longest waiting connection is closed."""

KEEP_ALIVE = 65
"""Seconds an idle connection is kept: longer than a load balancer's usual minute, so that the balancer closes first."""

GRACE = 20
"""Seconds that running requests have at shutdown."""

LENGTHS = frozenset({b"content-length", b"transfer-encoding"})
"""Headers of a request with a body."""

SLICE = 16 * 1024
"""Bytes parsed at once, after which the limits are checked. A read has up to 256 KiB."""


class Crowd:
    """What the connections of a server share: which can be closed to make room, the longest idle or unread first."""

    def __init__(self) -> None:
        """Start without any."""
        self.bodies = Budget()
        self.idle: dict[LimitedProtocol, None] = {}
        self.unread: dict[LimitedProtocol, None] = {}

    def make_room(self) -> bool:
        """Close the connection that matters least, and return whether there was one."""
        least = next(iter(self.idle or self.unread), None)
        if least is not None:
            self._close(least)
        return least is not None

    def bound_unsent(self) -> None:
        """Close connections whose clients do not read until `MAX_UNSENT` is kept."""
        while sum(each.transport.get_write_buffer_size() for each in self.unread) > MAX_UNSENT:
            self._close(next(iter(self.unread)))

    def forget(self, connection: LimitedProtocol) -> None:
        """Forget a connection that is closed."""
        self.idle.pop(connection, None)
        self.unread.pop(connection, None)

    def _close(self, connection: LimitedProtocol) -> None:
        self.forget(connection)
        connection.connections.discard(connection)
        connection.transport.abort()


class MessagePart(Enum):
    """The part of a message that a connection is in."""

    BETWEEN = "between two messages"
    HEAD = "head"
    BODY = "body"


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which has no limits of its own and answers in plain text."""

    def __init__(self, crowd: Crowd, *given: Any, **named: Any) -> None:  # noqa: ANN401 - as uvicorn's
        """Store the server's other connections."""
        super().__init__(*given, **named)
        self._crowd = crowd
        self._part = MessagePart.BETWEEN
        self._has_ended = False
        self._head_size = 0
        self._wire = RequestBody(crowd.bodies)
        self._wire_size = 0
        self._last_answer: problems.ProblemAnswer | None = None
        self._header_due: asyncio.TimerHandle | None = None
        self._read_due: asyncio.TimerHandle | None = None
        self._unsent = sys.maxsize

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Close another connection if there are too many, and start the header timer."""
        if len(self.connections) >= MAX_CONNECTIONS and not self._crowd.make_room():
            transport.abort()
            return
        super().connection_made(transport)
        self.client = plain(self.client)
        self.app_state = {**self.app_state, PEER: self.client}
        self._crowd.idle[self] = None
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        self._crowd.forget(self)
        self._header_came()
        if self._read_due is not None:
            self._read_due.cancel()
        for waiting, _ in self.pipeline:
            waiting.scope[WIRE].release()  # type: ignore[literal-required] # our own
        if self.transport is not None:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data piece by piece, within the limits."""
        rest = memoryview(data)
        while rest and not self._is_refused():
            rest = rest[self._parse(rest[:SLICE]) :]

    def on_message_begin(self) -> None:
        """Begin a head, which must arrive in time."""
        super().on_message_begin()
        self._part = MessagePart.HEAD
        self._unset_keepalive_if_required()
        self._expect_header()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; a trailer, which comes after the body, is ignored (RFC 9110, 6.5.1)."""
        if self._part is MessagePart.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, or let it wait for the one before it."""
        self._header_came()
        self._unset_keepalive_if_required()  # set anew if the answer before this request ended after its first byte
        self._head_size = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            message = "Too many requests wait on this connection."
            raise ValueError(message)
        # The parser takes the body of such a request for the next request.
        if self.parser.should_upgrade() and any(name in LENGTHS for name, _ in self.headers):
            message = "A request with a body cannot ask for an upgrade."
            raise ValueError(message)
        super().on_headers_complete()
        self._part = MessagePart.BODY
        self._wire, self._wire_size = RequestBody(self._crowd.bodies), 0
        self.scope[WIRE] = self._wire  # type: ignore[literal-required] # our own
        self._crowd.idle.pop(self, None)

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body, if there is memory for it."""
        if self.cycle.response_complete or self._wire.problem:
            return
        if problem := self._wire.take(len(body)):
            self._refuse(problem)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End the message."""
        super().on_message_complete()
        self._part = MessagePart.BETWEEN
        self._has_ended = True

    def on_response_complete(self) -> None:
        """Start the next request, or be idle."""
        super().on_response_complete()
        self._expect_reading()
        if self._is_answering() or self.transport.is_closing():
            return
        if self._last_answer is not None:
            self._answer(self._last_answer)
        else:
            self._crowd.idle[self] = None

    def pause_writing(self) -> None:
        """Record that the client reads more slowly than it is answered."""
        super().pause_writing()
        self._crowd.unread[self] = None
        self._expect_reading()
        self._crowd.bound_unsent()

    def resume_writing(self) -> None:
        """Note that the client has read."""
        super().resume_writing()
        self._crowd.unread.pop(self, None)
        self._unsent = sys.maxsize

    def _parse(self, piece: memoryview) -> int:
        """Parse the piece and return how many of its bytes were used: all, unless a message ended with an upgrade."""
        began_in, self._has_ended = self._part, False
        if began_in is MessagePart.BODY:
            self._wire_size += len(piece)
            if self._wire_size > MAX_WIRE_SIZE:
                self._refuse(TOO_LARGE)
                return len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:  # not offered: what follows is HTTP/1.1, as before
            return int(upgrade.args[0]) or len(piece)
        except httptools.HttpParserError:
            self._refuse(malformed("Invalid HTTP request received."))
            return len(piece)
        if self._part is not MessagePart.BODY and began_in is not MessagePart.BODY and not self._has_ended:
            self._head_size += len(piece)
            if self._head_size > MAX_HEADER_SIZE:
                self._refuse(TOO_LONG_A_HEADER)
        return len(piece)

    def _is_refused(self) -> bool:
        return self._last_answer is not None or self._wire.problem is not None or self.transport.is_closing()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr] # None at first

    def _refuse(self, problem: problems.ProblemAnswer) -> None:
        """Answer with the problem in its turn, and then close the connection."""
        self._header_came()
        if self._part is MessagePart.BODY and self._is_answering():  # the gate, which reads the body, answers
            self._wire.problem = problem
            self.cycle.message_event.set()
        elif self._is_answering():
            self._last_answer = problem
        else:
            self._answer(problem)

    def _answer(self, problem: problems.ProblemAnswer) -> None:
        body = problem.body()
        own = {"content-type": problems.MEDIA_TYPE, "content-length": str(len(body)), "connection": "close"}
        head = {**SECURITY_HEADERS, "cache-control": "no-store", **problem.headers, **own}
        lines = (
            f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}",
            *(f"{name}: {value}" for name, value in head.items()),
        )
        self._last_answer = problem
        self.transport.write("\r\n".join((*lines, "", "")).encode() + body)
        self.transport.close()
        self._expect_reading()

    def _expect_header(self) -> None:
        if self._header_due is None:
            self._header_due = self.loop.call_later(HEADER_WITHIN, self._header_is_late)

    def _header_came(self) -> None:
        if self._header_due is not None:
            self._header_due.cancel()
            self._header_due = None

    def _header_is_late(self) -> None:
        self._header_due = None
        if not self._is_refused():
            self._refuse(problems.of_status(408, f"The header did not arrive within {HEADER_WITHIN:g} seconds."))

    def _expect_reading(self) -> None:
        if self._read_due is None and self.transport.get_write_buffer_size():
            self._unsent = self.transport.get_write_buffer_size()
            self._read_due = self.loop.call_later(READ_WITHIN, self._check_reading)

    def _check_reading(self) -> None:
        self._read_due = None
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._unsent - unsent < LEAST_READ:
            self.transport.abort()
        else:
            self._expect_reading()


def config_of(app: ASGIApp) -> uvicorn.Config:
    """Return the server's configuration."""
    return uvicorn.Config(
        app,
        http=partial(LimitedProtocol, Crowd()),  # type: ignore[arg-type] # only called
        ws="none",
        lifespan="on",
        log_config=None,  # our own: one format for every line
        access_log=False,
        server_header=False,
        forwarded_allow_ips="127.0.0.1,::1",  # else a variable of uvicorn's own would decide
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
    )


class Server(uvicorn.Server):
    """uvicorn's server, which ends open streams before it waits for running requests."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the console's streams, then everything else."""
        if console := getattr(getattr(self.config.app, "state", None), "console", None):
            console.end_streams()
        await super().shutdown(sockets)


def serve(app: ASGIApp, sockets: list[socket.socket]) -> None:
    """Serve on these until SIGTERM or SIGINT."""
    Server(config_of(app)).run(sockets)

"""Serves the application with uvicorn, and limits what each connection may cost.

The limits apply before the first request, between requests and after the last request.
"""

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
"""The key of the peer's address in a request's state; the address is not taken from headers."""

HEADER_WITHIN = 10.0
"""Time limit in seconds for all headers of a request to arrive."""

MAX_WIRE_SIZE = 1024 * 1024 * 5 // 4
"""Maximum size of a request body on the wire, in bytes. Chunk framing may add a quarter to the body."""

CHUNK_COST = 32
"""Each chunk counts as its size plus this number of bytes. Parsing even a one-byte chunk takes 1 us."""

MAX_PIPELINED = 16
"""Maximum number of pipelined requests that may wait on one connection."""

MAX_CONNECTIONS = 2_000
"""Maximum number of open connections.

If there are more connections, an idle one is closed, preferably one without a valid API key. If no connection is idle,
one whose client is slow to read is closed. If no client is slow to read, the new connection is closed.
"""

READ_WITHIN = 20.0
LEAST_READ = 64 * 1024
"""Number of bytes of its response that a client must read within `READ_WITHIN` seconds.

If less of the response is left, the client must read all of it.
"""

MAX_UNSENT = 32 * 1024 * 1024
"""Maximum total size of unread responses, in bytes.

Above this size, the connection with the oldest unread response is closed, preferably one without a valid API key.
"""

KEEP_ALIVE = 65
"""Number of seconds for which a connection may be idle before it is closed.

A load balancer usually keeps an idle connection for 60 seconds. The web server keeps idle connections longer than the
load balancer, which therefore closes them first.
"""

GRACE = 20
"""Seconds that running requests have to finish at shutdown."""

LENGTHS = frozenset({b"content-length", b"transfer-encoding"})
"""Headers that only requests with a body have."""

SLICE = 16 * 1024
"""Number of bytes that are parsed between two checks of the limits. A single read from the socket returns up to 256
KiB.
"""


class OpenConnections:
    """The state that all connections of a server share.

    Connections that can be closed to admit new ones are stored in the order in which they became idle or unread. Idle
    ones are closed before unread ones; within each group, those without a valid API key are closed first.
    """

    def __init__(self) -> None:
        """Start without connections."""
        self.bodies = Budget()
        self.idle: dict[LimitedProtocol, None] = {}
        self.unread: dict[LimitedProtocol, None] = {}

    def make_room(self) -> bool:
        """Close a connection that is idle or whose response is unread; return whether there was one."""
        if not (self.idle or self.unread):
            return False
        self._close_first(self.idle or self.unread)
        return True

    def bound_unsent(self) -> None:
        """While more than `MAX_UNSENT` bytes are unsent, close a connection whose client does not read."""
        while sum(each.transport.get_write_buffer_size() for each in self.unread) > MAX_UNSENT:
            self._close_first(self.unread)

    def forget(self, connection: LimitedProtocol) -> None:
        """Remove a connection that has been closed."""
        self.idle.pop(connection, None)
        self.unread.pop(connection, None)

    def _close_first(self, connections: dict[LimitedProtocol, None]) -> None:
        """Close the first connection without a valid API key, or the first of all if each has a key."""
        connection = next((each for each in connections if not each.has_key), next(iter(connections)))
        self.forget(connection)
        connection.connections.discard(connection)
        connection.transport.abort()


class MessagePart(Enum):
    """The part of an HTTP message that a connection is reading at the moment."""

    BETWEEN = "between two messages"
    HEAD = "head"
    BODY = "body"


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits. Its error responses are problem+json instead of plain text."""

    def __init__(self, connections: OpenConnections, *given: Any, **named: Any) -> None:  # noqa: ANN401 - as uvicorn's
        """Store the state that all connections of the server share."""
        super().__init__(*given, **named)
        self._open_connections = connections
        self._part = MessagePart.BETWEEN
        self._has_ended = False
        self._head_size = 0
        self._wire = RequestBody(connections.bodies)
        self._wire_size = 0
        self._last_answer: problems.ProblemAnswer | None = None
        self._header_due: asyncio.TimerHandle | None = None
        self._read_due: asyncio.TimerHandle | None = None
        self._unsent = sys.maxsize

    @property
    def has_key(self) -> bool:
        """Whether the connection's latest request had a valid API key."""
        return self._wire.owner is not None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Close another connection if too many are open, and start the time limit for the headers."""
        if len(self.connections) >= MAX_CONNECTIONS and not self._open_connections.make_room():
            transport.abort()
            return
        super().connection_made(transport)
        self.client = plain(self.client)
        self.app_state = {**self.app_state, PEER: self.client}
        self._open_connections.idle[self] = None
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the connection's timers and release its memory."""
        self._open_connections.forget(self)
        self._header_came()
        if self._read_due is not None:
            self._read_due.cancel()
        for waiting, _ in self.pipeline:
            waiting.scope[WIRE].release()  # type: ignore[literal-required] # our own
        if self.transport is not None:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the received data in slices, within the limits."""
        rest = memoryview(data)
        while rest and not self._is_refused():
            rest = rest[self._parse(rest[:SLICE]) :]

    def on_message_begin(self) -> None:
        """Start reading the headers of a request, which must arrive within the time limit."""
        super().on_message_begin()
        self._part = MessagePart.HEAD
        self._unset_keepalive_if_required()
        self._expect_header()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header. Trailers, which follow the body, are ignored (RFC 9110, 6.5.1)."""
        if self._part is MessagePart.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, or queue it until all earlier requests have been answered."""
        self._header_came()
        # the end of the previous response may have restarted the keep-alive timer
        self._unset_keepalive_if_required()
        self._head_size = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            message = "Too many requests are waiting on this connection."
            raise ValueError(message)
        # Otherwise, the parser would treat the body of an upgrade request as the next request.
        if self.parser.should_upgrade() and any(name in LENGTHS for name, _ in self.headers):
            message = "A request with a body cannot ask for an upgrade."
            raise ValueError(message)
        super().on_headers_complete()
        self._part = MessagePart.BODY
        self._wire, self._wire_size = RequestBody(self._open_connections.bodies), 0
        self.scope[WIRE] = self._wire  # type: ignore[literal-required] # our own
        self._open_connections.idle.pop(self, None)

    def on_body(self, body: bytes) -> None:
        """Store a chunk of the body, or refuse the request if memory is short."""
        if self.cycle.response_complete or self._wire.problem:
            return
        self._wire_size += CHUNK_COST
        if problem := self._wire.take(len(body)):
            self._refuse(problem)
            return
        if not self.cycle.body:
            # a `bytearray` grows in place, whereas `bytes` would be copied for each chunk
            self.cycle.body = bytearray()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Record that the request has arrived completely."""
        super().on_message_complete()
        self._part = MessagePart.BETWEEN
        self._has_ended = True

    def on_response_complete(self) -> None:
        """Start the next pipelined request, or mark the connection as idle."""
        super().on_response_complete()
        self._expect_reading()
        if self._is_answering() or self.transport.is_closing():
            return
        if self._last_answer is not None:
            self._answer(self._last_answer)
        else:
            self._open_connections.idle[self] = None

    def pause_writing(self) -> None:
        """Record that the client reads the response more slowly than the server writes it."""
        super().pause_writing()
        self._open_connections.unread[self] = None
        self._expect_reading()
        self._open_connections.bound_unsent()

    def resume_writing(self) -> None:
        """Record that the client has read enough of its response for writing to continue."""
        super().resume_writing()
        self._open_connections.unread.pop(self, None)
        self._unsent = sys.maxsize

    def _parse(self, piece: memoryview) -> int:
        """Parse a slice and return the number of bytes parsed.

        If the slice contains the end of an upgrade request, parsing stops there. Otherwise all bytes are parsed.
        """
        began_in, self._has_ended = self._part, False
        if began_in is MessagePart.BODY:
            self._wire_size += len(piece)
            if self._wire_size > MAX_WIRE_SIZE:
                self._refuse(TOO_LARGE)
                return len(piece)
        try:
            self.parser.feed_data(piece)
        # The server does not switch protocols: the bytes after the upgrade request are parsed as HTTP/1.1.
        except httptools.HttpParserUpgrade as upgrade:
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
        """Send the error response after all earlier responses, and then close the connection."""
        self._header_came()
        # The gate, which is reading the body, sends the error response.
        if self._part is MessagePart.BODY and self._is_answering():
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
    """Return uvicorn's configuration for the application."""
    return uvicorn.Config(
        app,
        http=partial(LimitedProtocol, OpenConnections()),  # type: ignore[arg-type] # only called
        ws="none",
        lifespan="on",
        log_config=None,  # the project's own logging uses one format for every line
        access_log=False,
        server_header=False,
        # without this argument, uvicorn would read an environment variable instead
        forwarded_allow_ips="127.0.0.1,::1",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
    )


class Server(uvicorn.Server):
    """uvicorn's server, except that on shutdown it ends event streams first, then waits for requests."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the console's event streams, then shut down uvicorn."""
        if console := getattr(getattr(self.config.app, "state", None), "console", None):
            console.end_streams()
        await super().shutdown(sockets)


def serve(app: ASGIApp, sockets: list[socket.socket]) -> None:
    """Serve the application on the given sockets until SIGTERM or SIGINT."""
    Server(config_of(app)).run(sockets)

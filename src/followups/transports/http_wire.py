"""One HTTP connection as its calls see it: a request goes in, the answer to it comes out.

aiohttp makes the connection and keeps the books on it; from then on its bytes come here and are parsed by llhttp
(httptools), with one parser for each connection and one future and timer for each call. Beside aiohttp's own way,
with its parsers, streams and headers, that saves 30 of a call's 80 us of processor time.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import ssl
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

import aiohttp
import httptools

from followups.transports.answers import Answer
from followups.transports.endpoint import tls_reason
from followups.uptime import uptime

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection

BODY_LIMIT = 64 * 1024
"""Bytes of an answer's body that are read at most (contract, section 4)."""

HEAD_LIMIT = 64 * 1024
"""Bytes of an answer's head, the informational answers before it included."""

FRAMED_LIMIT = 1024 * 1024
"""Bytes that a body may take with its chunk sizes and trailers, after the segment in which its head ended."""

READ_HEADERS = {b"retry-after": "retry-after", b"date": "date"}

LONG = "the body of the answer is longer than 64 KiB"
LATE = "the body of the answer did not come in time"


class HeadTooLongError(Exception):
    """The head of an answer is longer than `HEAD_LIMIT`."""


class Wire(asyncio.Protocol):
    """A connection, for one request after the other. The methods ``on_...`` are the parser's."""

    __slots__ = (
        "_body",
        "_connection",
        "_framed",
        "_handler",
        "_headers",
        "_in_order",
        "_length",
        "_loop",
        "_parser",
        "_readable",
        "_room",
        "_status",
        "_transport",
        "_waiter",
        "since",
        "spoke",
    )

    def __init__(self, connection: Connection) -> None:
        """Take over a connection that aiohttp has just made. Raises `OSError` when it is lost already."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._handler = cast("ResponseHandler", connection.protocol)  # None only after its release
        # uvloop may read the end before whoever waits for the connection goes on, and would drop what is written.
        if connection.transport is None or connection.transport.is_closing():
            connection.close()
            raise connection_reset()
        self._transport = connection.transport
        self.since = uptime()
        """When it was last used."""
        self.spoke = self._handler.should_close
        """Whether something came that nobody had asked for: it would count as the answer to the next call."""
        self._in_order = True
        self._waiter: asyncio.Future[Answer] | None = None
        self._parser: httptools.HttpResponseParser | None = _new_parser(self)
        self._readable = select.poll()
        self._readable.register(self._transport.get_extra_info("socket"), select.POLLIN)
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._room = HEAD_LIMIT
        self._begin()
        self._transport.set_protocol(self)

    @property
    def reusable(self) -> bool:
        """Whether it can take another request: nothing is due on it either way, and both sides leave it open."""
        clean = self._in_order and not self.spoke and not self._transport.is_closing()
        return clean and not self._transport.get_write_buffer_size()

    def is_silent(self) -> bool:
        """Return whether nothing has come that the loop is still to read: an end, or an answer to nothing."""
        return not self._readable.poll(0)

    def close(self) -> None:
        """Hang up; again is harmless. What is left of a request that was given up is not sent any more."""
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        self._connection.close()

    async def ask(self, request: bytes, until: float) -> Answer:
        """Write the request at once, and return the answer, whose body may have a flaw.

        ``until`` is an `uptime`. Raises where no answer has begun: `TimeoutError`, or how it broke.
        """
        self._begin()
        self._in_order = False
        waiter: asyncio.Future[Answer] = self._loop.create_future()
        self._waiter = waiter
        timer = self._loop.call_later(until - uptime(), self._late)
        try:
            self._transport.write(request)
            return await waiter
        finally:
            timer.cancel()
            self._waiter = None

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        room = self._room
        self._room = room - len(data)
        try:
            if len(data) <= room:
                self._feed(data)
            else:
                self._feed_no_more_than(room, data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, HeadTooLongError) as error:
            self._end(error)
            self._transport.close()

    def eof_received(self) -> None:
        """Take the end as such, before what is still to be written is gone."""
        self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is waited for, and let aiohttp know, whose connector waits for it when it closes."""
        self._end(exc)
        self._parser = None  # it holds this object
        self._handler.connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin an answer, which may be an informational one."""
        if self._waiter is None:
            self.spoke = True
            self._transport.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep of the headers what is read of them, the first of each name; trailers are none."""
        name = name.lower()
        if name == b"content-length" or (name == b"transfer-encoding" and b"chunked" in value.lower()):
            self._framed = True
        elif not self._status and (known := READ_HEADERS.get(name)):
            self._headers.setdefault(known, value.decode(errors="replace"))

    def on_headers_complete(self) -> None:
        """Take the status, which decides from here on, whatever becomes of the body."""
        status = cast("httptools.HttpResponseParser", self._parser).get_status_code()
        if status >= HTTPStatus.OK or status == HTTPStatus.SWITCHING_PROTOCOLS:
            self._status = status
            self._room = FRAMED_LIMIT
        else:  # another one follows, with headers of its own
            self._headers, self._framed = {}, False
        if status == HTTPStatus.SWITCHING_PROTOCOLS:
            self._finish()

    def on_body(self, part: bytes) -> None:
        """Keep a part of the body."""
        if self._waiter is None or not self._status:
            return
        self._body.append(part)
        self._length += len(part)
        if self._length > BODY_LIMIT:
            self._finish(LONG)

    def on_message_complete(self) -> None:
        """Hand over the answer."""
        if self._waiter is not None and self._status:
            self._in_order = cast("httptools.HttpResponseParser", self._parser).should_keep_alive()
            self._finish()

    def _begin(self) -> None:
        self._status = 0
        self._length = 0
        self._room = HEAD_LIMIT
        self._framed = False
        self._headers = {}
        self._body = []

    def _feed(self, data: bytes) -> None:
        if self._parser is not None:
            self._parser.feed_data(data)

    def _feed_no_more_than(self, room: int, data: bytes) -> None:
        in_body = self._status
        self._feed(data[: max(room, 0)])
        if not self._status:
            raise HeadTooLongError
        if in_body:
            self._finish(LONG)
        else:
            self._feed(data[room:])

    def _finish(self, flaw: str = "") -> None:
        if flaw:
            self._in_order = False  # what is still to come is not waited for
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(Answer(self._status, self._headers, b"".join(self._body)[:BODY_LIMIT], flaw))

    def _fail(self, error: BaseException) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)

    def _end(self, error: Exception | None) -> None:
        self._in_order = False
        if not self._status:
            self._fail(error or aiohttp.ServerDisconnectedError())
        elif self._framed or error is not None:
            kind = kind_of(error or aiohttp.ServerDisconnectedError())
            self._finish(f"the body of the answer broke off ({kind})")
        else:  # the end is what such a body ends with
            self._finish()

    def _late(self) -> None:
        if self._status:
            self._finish(LATE)
        else:
            self._fail(TimeoutError())


def _new_parser(callbacks: Wire) -> httptools.HttpResponseParser:
    parser = httptools.HttpResponseParser(callbacks)
    # What aiohttp puts up with.
    parser.set_dangerous_leniencies(
        lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
    )
    return parser


def connection_reset() -> ConnectionResetError:
    """Return the error of a connection that was lost as it was made, as the operating system words it."""
    return ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def kind_of(error: BaseException) -> str:
    """Name an error without its text, which may hold addresses and parts of an answer."""
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None)
    if isinstance(inner, ssl.SSLError):
        return tls_reason(inner)  # its errno is OpenSSL's, no operating system's
    number = getattr(error, "errno", None)
    return os.strerror(number) if isinstance(number, int) and number > 0 else type(error).__name__

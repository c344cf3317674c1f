"""One HTTP call, and whether its request went out: what the transports over HTTP share.

The line between "try again" and "nobody knows" is whether the request went out: an error before its first
byte was handed to the socket is a `Retry`, one after that, without a status line, is `Unknown`.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import ssl
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

import aiohttp
from yarl import URL

from followups.transports.answers import Answer, Dialect, outcome_of
from followups.transports.endpoint import tls_reason
from followups.transports.port import Outcome, Retry, Unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection
    from aiohttp.http_parser import RawResponseMessage

    from followups.settings import Settings

BODY_LIMIT = 64 * 1024
"""Bytes of an answer that are read at most (contract, section 4)."""

KEEPALIVE = 4.0
"""Seconds an idle connection is kept: less than the 5 s after which Node, uvicorn and Apache hang up by
default, since a request on a connection that is just being closed has an unknown outcome."""

HEADERS = {"user-agent": "followups", "accept": "application/json", "accept-encoding": "identity"}

# UTF-8, not \u escapes: these treble most alphabets, and receivers limit the size of a body.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def encode_json(document: Mapping[str, object]) -> bytes:
    """Return JSON in UTF-8, compact; what UTF-8 cannot hold (half a surrogate pair) becomes a question mark."""
    return _ENCODER.encode(document).encode(errors="replace")


@dataclass(frozen=True, slots=True)
class Call:
    """One request: ``url`` absolute and of the endpoint's host, ``body`` as it goes over the wire."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes


class HttpCaller:
    """The connections of a process to ``FOLLOWUPS_TRANSPORT_URL``: as many as it may make calls at once."""

    def __init__(self, settings: Settings) -> None:
        """Keep the limits; nothing is opened."""
        self._endpoint = URL(settings.transport_url or "")
        self._timeout = settings.transport_timeout.total_seconds()
        # By default aiohttp rounds timeouts above 5 s up to whole seconds: the lease is not told.
        self._limit = aiohttp.ClientTimeout(connect=self._timeout, ceil_threshold=math.inf)
        self._connections = settings.concurrency
        self._reuse = settings.transport_deduplicates
        self._connector: aiohttp.TCPConnector | None = None

    async def open(self) -> None:
        """Be ready to connect in the running loop; again is harmless."""
        if self._connector is None:
            self._connector = self._new_connector()
            headers = HEADERS if self._reuse else HEADERS | {"connection": "close"}
            # Never sent itself: the connector wants to know by it where to, and it knows what the URL's headers are.
            self._origin = aiohttp.ClientRequest("GET", self._endpoint, headers=headers)
            self._head = _lines(self._origin.headers)

    async def close(self) -> None:
        """Close the connections; again is harmless."""
        connector, self._connector = self._connector, None
        if connector is not None:
            await connector.close()

    async def deliver(self, call: Call, dialect: Dialect) -> Outcome:
        """Make the call and say what its answer, or the lack of one, means. Raises for no answer at all.

        `RuntimeError`: the transport was not opened.
        """
        if self._connector is None:
            message = "The transport is not open: await open() first."
            raise RuntimeError(message)
        until = time.monotonic() + self._timeout
        try:
            request = self._request(call)
            connection = await self._connector.connect(self._origin, [], self._limit)
        except Exception as error:  # noqa: BLE001 - whatever the other side provokes is an outcome, not a crash
            return self._not_sent(error)
        # A process that was frozen while it connected would write before it sees that its time is up, perhaps
        # after the follow-up was cancelled, or sent by another.
        if time.monotonic() > until:
            connection.release()
            return self._not_sent(TimeoutError())
        if _protocol(connection).should_close:
            connection.close()  # something came that nobody asked for: it would count as the answer to this call
            return Retry("no connection: the receiver spoke out of turn")
        try:
            answer = await _exchange(connection, request, until)
        except Exception as error:  # noqa: BLE001 - the same
            return self._unknown(error)
        return outcome_of(answer, dialect)

    def _new_connector(self) -> aiohttp.TCPConnector:
        # Where the receiver cannot deduplicate, no connection is used twice: a stale one breaks after the
        # request went out, and a follow-up would fail as outcome_unknown for nothing.
        if self._reuse:
            return aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEPALIVE)
        return aiohttp.TCPConnector(limit=self._connections, force_close=True)

    def _request(self, call: Call) -> bytes:
        start = f"{call.method} {URL(call.url).raw_path_qs} HTTP/1.1\r\n"
        length = f"content-length: {len(call.body)}\r\n\r\n"
        return f"{start}{self._head}{_lines(call.headers)}{length}".encode() + call.body

    def _unknown(self, error: Exception) -> Unknown:
        if isinstance(error, TimeoutError):
            return Unknown(f"no answer within {self._timeout:g} s")
        return Unknown(f"the connection broke before an answer came ({_kind(error)})")

    def _not_sent(self, error: Exception) -> Retry:
        if isinstance(error, TimeoutError):
            return Retry(f"no connection within {self._timeout:g} s")
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return Retry("the host name was not found (DNS)")
        if isinstance(error, aiohttp.ClientSSLError):
            return Retry(f"no secure connection (TLS): {_kind(error)}")
        return Retry(f"no connection: {_kind(error)}")


def _lines(headers: Mapping[str, str]) -> str:
    if not "".join(headers.values()).isprintable():
        message = "a header's value holds a line break or another control character"
        raise ValueError(message)
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


def _protocol(connection: Connection) -> ResponseHandler:
    return cast("ResponseHandler", connection.protocol)  # None only after its release


async def _exchange(connection: Connection, request: bytes, until: float) -> Answer:
    """Write the request at once, and return the answer, whose body may have a flaw. Raises where none has begun."""
    protocol = _protocol(connection)
    try:
        protocol.set_response_params(read_until_eof=True, auto_decompress=False)  # 64 KiB of gzip may be 64 MiB of text
        cast("asyncio.Transport", protocol.transport).write(request)
        head, content = await _answer_of(protocol, until)
        body, flaw = await _read(content, until)
    except BaseException:
        connection.close()
        raise
    if flaw:
        connection.close()  # what is still to come is not waited for
    else:
        connection.release()
    return Answer(head.code, head.headers, body, flaw)


async def _answer_of(protocol: ResponseHandler, until: float) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
    timer = _at(until, protocol)
    try:
        while True:
            head, content = await protocol.read()
            if head.code >= HTTPStatus.OK or head.code == HTTPStatus.SWITCHING_PROTOCOLS:
                return head, content
    finally:
        timer.cancel()


def _at(until: float, waited_for: ResponseHandler | aiohttp.StreamReader) -> asyncio.TimerHandle:
    """Let `TimeoutError` come of what is waited for. Takes a fifth of the time that `asyncio.timeout` does."""
    return asyncio.get_running_loop().call_later(until - time.monotonic(), waited_for.set_exception, TimeoutError())


async def _read(content: aiohttp.StreamReader, until: float) -> tuple[bytes, str]:
    """Return at most `BODY_LIMIT` bytes of the body, and why that is not all of it ('' when it is)."""
    timer = _at(until, content)
    body = bytearray()
    try:
        while not content.at_eof() and (chunk := await content.read(BODY_LIMIT + 1 - len(body))):
            body += chunk
            if len(body) > BODY_LIMIT:
                return bytes(body[:BODY_LIMIT]), "the body of the answer is longer than 64 KiB"
    except TimeoutError:
        return bytes(body), "the body of the answer did not come in time"
    except Exception as error:  # noqa: BLE001 - the status has decided already, whatever happens to the body
        return bytes(body), f"the body of the answer broke off ({_kind(error)})"
    finally:
        timer.cancel()
    return bytes(body), ""


def _kind(error: BaseException) -> str:
    """Name an error without its text, which may hold addresses and parts of an answer."""
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None)
    if isinstance(inner, ssl.SSLError):
        return tls_reason(inner)  # its errno is OpenSSL's, no operating system's
    number = getattr(error, "errno", None)
    return os.strerror(number) if isinstance(number, int) and number > 0 else type(error).__name__

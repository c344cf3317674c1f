"""One HTTP call, and whether its request went out: what the transports over HTTP share.

The line between "try again" and "nobody knows" is whether the request went out: an error before its first
byte was handed to the socket is a `Retry`, one after that, without a status line, is `Unknown`.
"""

from __future__ import annotations

import json
import math
import os
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from followups.transports.answers import Answer, Dialect, outcome_of
from followups.transports.endpoint import tls_reason
from followups.transports.port import Outcome, Retry, Unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.abc import AbstractStreamWriter

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
    """One request: ``url`` absolute, ``body`` as it goes over the wire."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes


class _BrokenConnectionError(aiohttp.ClientError):
    """The connection broke: said in a way that aiohttp does not repeat the request for."""


class _Body(aiohttp.BytesPayload):
    """A body that knows whether it was written, and is not written after ``until`` (monotonic seconds).

    A process that was frozen while it connected would write before it sees that its time is up, perhaps after
    the follow-up was cancelled, or sent by another. aiohttp writes the headers together with the body. A
    `TraceConfig` tells the same, at 35 us a call: a quarter of all that a call costs.
    """

    def __init__(self, value: bytes, until: float) -> None:
        """Take the body as it goes out."""
        super().__init__(value)
        self.went_out = False
        self._until = until

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Write to the socket, and note first that this began. Raises `TimeoutError` when it is too late to."""
        if time.monotonic() > self._until:
            raise TimeoutError
        self.went_out = True
        await super().write_with_length(writer, content_length)


class HttpCaller:
    """The one HTTP session of a process: as many connections as it may make calls at once."""

    def __init__(self, settings: Settings) -> None:
        """Keep the limits; nothing is opened."""
        self._timeout = settings.transport_timeout.total_seconds()
        self._connections = settings.concurrency
        self._reuse = settings.transport_deduplicates
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Open the session in the running loop; again is harmless."""
        if self._session is None:
            self._session = self._new_session()

    async def close(self) -> None:
        """Close the session and its connections; again is harmless."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def deliver(self, call: Call, dialect: Dialect) -> Outcome:
        """Make the call and say what its answer, or the lack of one, means. Raises for no answer at all.

        `RuntimeError`: the transport was not opened.
        """
        if self._session is None:
            message = "The transport is not open: await open() first."
            raise RuntimeError(message)
        body = _Body(call.body, time.monotonic() + self._timeout)
        try:
            answer = await self._answer(self._session, call, body)
        except Exception as error:  # noqa: BLE001 - whatever the other side provokes is an outcome, not a crash
            return self._unknown(error) if body.went_out else self._not_sent(error)
        return outcome_of(answer, dialect)

    def _new_session(self) -> aiohttp.ClientSession:
        # Where the receiver cannot deduplicate, no connection is used twice: a stale one breaks after the
        # request went out, and a follow-up would fail as outcome_unknown for nothing.
        connector = (
            aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEPALIVE)
            if self._reuse
            else aiohttp.TCPConnector(limit=self._connections, force_close=True)
        )
        return aiohttp.ClientSession(
            connector=connector,
            # By default aiohttp rounds timeouts above 5 s up to whole seconds: the lease is not told.
            timeout=aiohttp.ClientTimeout(total=self._timeout, ceil_threshold=math.inf),
            headers=HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,  # "identity" was asked for; 64 KiB of gzip may be 64 MiB of text
        )

    async def _answer(self, session: aiohttp.ClientSession, call: Call, payload: _Body) -> Answer:
        # aiohttp repeats nothing but idempotent methods, and a middleware costs every call some microseconds.
        middlewares = () if call.method == "POST" else (_without_repetition,)
        async with session.request(
            call.method, call.url, data=payload, headers=call.headers, allow_redirects=False, middlewares=middlewares
        ) as response:
            body, flaw = await _read(response)
            if flaw:
                response.close()  # what is still to come is not waited for
            return Answer(response.status, response.headers, body, flaw)

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


async def _without_repetition(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    # aiohttp sends a PUT a second time, silently, when its connection breaks. Whether to send again is for
    # the dispatcher to decide: it knows whether the receiver deduplicates.
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise  # no connection, hence no request; aiohttp leaves these alone
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _BrokenConnectionError from error


async def _read(response: aiohttp.ClientResponse) -> tuple[bytes, str]:
    """Return at most `BODY_LIMIT` bytes of the body, and why that is not all of it ('' when it is)."""
    body = bytearray()
    try:
        content = response.content
        while not content.at_eof() and (chunk := await content.read(BODY_LIMIT + 1 - len(body))):
            body += chunk
            if len(body) > BODY_LIMIT:
                return bytes(body[:BODY_LIMIT]), "the body of the answer is longer than 64 KiB"
    except TimeoutError:
        return bytes(body), "the body of the answer did not come in time"
    except Exception as error:  # noqa: BLE001 - the status has decided already, whatever happens to the body
        return bytes(body), f"the body of the answer broke off ({_kind(error)})"
    return bytes(body), ""


def _kind(error: BaseException) -> str:
    """Name an error without its text, which may hold addresses and parts of an answer."""
    cause = error.__cause__ if isinstance(error, _BrokenConnectionError) else error
    inner = getattr(cause, "certificate_error", None) or getattr(cause, "os_error", None)
    if isinstance(inner, ssl.SSLError):
        return tls_reason(inner)  # its errno is OpenSSL's, no operating system's
    number = getattr(cause, "errno", None)
    return os.strerror(number) if isinstance(number, int) and number > 0 else type(cause).__name__

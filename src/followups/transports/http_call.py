"""One HTTP call, and whether its request went out: what the transports over HTTP share.

The line between "try again" and "nobody knows" is whether the request went out: an error before its first
byte was handed to the socket is a `Retry`, one after that, without an answer's head, is `Unknown`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from followups.transports.answers import Dialect, outcome_of
from followups.transports.http_connections import KEEPALIVE, Connections
from followups.transports.http_wire import kind_of
from followups.transports.port import Outcome, Retry, Unknown
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Mapping

    from followups.settings import Settings

HEADERS = {
    "user-agent": "followups",
    "accept": "application/json",
    "accept-encoding": "identity",
    "content-type": "application/json",
}
"""Of every request."""

# UTF-8, not \u escapes: these treble most alphabets, and receivers limit the size of a body.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def encode_json(document: Mapping[str, object]) -> bytes:
    """Return JSON in UTF-8, compact; what UTF-8 cannot hold (half a surrogate pair) becomes a question mark."""
    return _ENCODER.encode(document).encode(errors="replace")


@dataclass(frozen=True, slots=True)
class Call:
    """One request: ``url`` absolute and of the endpoint's host, ``headers`` of this one, ``body`` JSON in UTF-8."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes


class HttpCaller:
    """The calls of a process to ``FOLLOWUPS_TRANSPORT_URL``, over as many connections as it may make calls at once."""

    def __init__(self, settings: Settings, headers: Mapping[str, str] | None = None) -> None:
        """Keep the limits, and the headers that every request is to carry; nothing is opened."""
        self._endpoint = URL(settings.transport_url or "")
        self._timeout = settings.transport_timeout.total_seconds()
        self._limit = settings.concurrency
        # Where the receiver cannot deduplicate, no connection is used twice: a stale one breaks after the
        # request went out, and a follow-up would fail as outcome_unknown for nothing.
        self._kept = KEEPALIVE if settings.transport_deduplicates else 0.0
        self._headers = HEADERS | dict(headers or {}) | ({} if self._kept else {"connection": "close"})
        self._connections: Connections | None = None

    async def open(self) -> None:
        """Be ready to connect in the running loop; again is harmless."""
        if self._connections is None:
            self._connections = Connections(self._endpoint, self._headers, self._limit, self._kept)
            self._head = _lines(self._connections.headers)

    async def close(self) -> None:
        """Close the connections; again is harmless."""
        connections, self._connections = self._connections, None
        if connections is not None:
            await connections.close()

    async def deliver(self, call: Call, dialect: Dialect) -> Outcome:
        """Make the call and say what its answer, or the lack of one, means. Raises for no answer at all.

        `RuntimeError`: the transport was not opened.
        """
        connections = self._connections
        if connections is None:
            message = "The transport is not open: await open() first."
            raise RuntimeError(message)
        until = uptime() + self._timeout
        try:
            request = self._request(call)
            wire = await connections.take(until)
        except Exception as error:  # noqa: BLE001 - whatever the other side provokes is an outcome, not a crash
            return self._not_sent(error)
        try:
            if wire.spoke:
                return Retry("no connection: the receiver spoke out of turn")
            answer = await wire.ask(request, until)
        except Exception as error:  # noqa: BLE001 - the same
            return self._unknown(error)
        finally:
            connections.give(wire)
        return outcome_of(answer, dialect)

    def _request(self, call: Call) -> bytes:
        start = f"{call.method} {_target(call.url)} HTTP/1.1\r\n"
        length = f"content-length: {len(call.body)}\r\n\r\n"
        return f"{start}{self._head}{_lines(call.headers)}{length}".encode() + call.body

    def _unknown(self, error: Exception) -> Unknown:
        if isinstance(error, TimeoutError):
            return Unknown(f"no answer within {self._timeout:g} s")
        return Unknown(f"the connection broke before an answer came ({kind_of(error)})")

    def _not_sent(self, error: Exception) -> Retry:
        if isinstance(error, TimeoutError):
            return Retry(f"no connection within {self._timeout:g} s")
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return Retry("the host name was not found (DNS)")
        if isinstance(error, aiohttp.ClientSSLError):
            return Retry(f"no secure connection (TLS): {kind_of(error)}")
        return Retry(f"no connection: {kind_of(error)}")


def _lines(headers: Mapping[str, str]) -> str:
    if not "".join(headers.values()).isprintable():
        message = "a header's value holds a line break or another control character"
        raise ValueError(message)
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


@lru_cache(maxsize=16)
def _target(url: str) -> str:
    return URL(url).raw_path_qs

"""HTTP calls through libcurl and their outcomes, shared by the transports that use HTTP.

A failed call's outcome depends on what may have been sent, which `http_exchange` records. If a call fails before any
part of the request was sent, its outcome is `Retry`. If the worker has reached, or almost reached, its limit on open
files or threads, the outcome is `Snoozed` instead. If a call fails later, and no final status has arrived, its outcome
is `Unknown`.

This module also decides when connections are reused, replaced and closed. `http_exchange` limits the size of an answer.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from typing import TYPE_CHECKING

import pycurl

from followups.errors import FollowUpsError
from followups.settings import hide_password
from followups.transports.answers import Dialect, outcome_of
from followups.transports.curl_loop import CLOSED, CurlLoop
from followups.transports.endpoint import connection_options
from followups.transports.http_exchange import FLOODED, LONG_HEAD, TOO_LARGE, Exchange
from followups.transports.http_sockets import Sockets
from followups.transports.port import Outcome, Retry, Snoozed, Unknown
from followups.uptime import uptime
from followups.waits import wait

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from followups.settings import Settings

KEEPALIVE = 3
"""Seconds for which an idle connection is kept.

Uvicorn, Node.js and Apache keep idle connections for 5 s by default. If the server closes a connection during a
request, the request's outcome is unknown.
"""

SWEEP_INTERVAL = 0.1
"""Seconds between two sweeps, which end floods and close idle connections."""

STREAMS = 10
"""Maximum number of simultaneous calls on one HTTP/2 connection. If the connection breaks, the outcomes of all calls on
it are unknown.
"""

READ_SIZE = 1024
"""How many bytes libcurl reads at a time.

libcurl reads from a connection up to ten times before other connections get their turn.
"""

TLS_RECORD_SIZE = 16_384
"""The largest content of a TLS record.

If libcurl reads whole records, it notices what follows an answer in the same record, and closes the connection.
"""

HEADERS = {
    "accept": "application/json",
    "accept-encoding": "identity",
    "content-type": "application/json",
    "expect": "",
}
"""Headers of every request, besides User-Agent, which is an option of the connection. The empty Expect header keeps
libcurl from adding one of its own. With libcurl's own Expect header, a body of more than 1 MiB would wait for the
endpoint's permission.
"""

NO_RESOURCES = "no connection: the worker has reached its limit on open files or threads"
"""The detail of `Snoozed` if the worker's own limits prevented a call. Such a call uses up no attempt, and is no
failure of the endpoint.
"""
FILES_PER_CONNECTION = 4
"""The number of files that a new connection may need: its socket, a copy of the file descriptor, and two for looking up
the host.
"""
NO_RESOURCES_CODE = -3
"""The result code of calls for which `CurlLoop` could not be created. It is not one of libcurl's codes."""
_LOOK_UP_FAILURES = {pycurl.E_OPERATION_TIMEDOUT, pycurl.E_COULDNT_RESOLVE_HOST, pycurl.E_COULDNT_RESOLVE_PROXY}
"""The result codes of calls that may have failed because libcurl could start no thread to look up the host."""
_RESOURCE_ERRORS = (OSError, RuntimeError, pycurl.error)
"""The exceptions of `CurlLoop` if the process may open no more files or start no more threads."""

_INVALID_ANSWERS = {
    FLOODED: "it is endless",
    TOO_LARGE: LONG_HEAD,
    pycurl.E_UNSUPPORTED_PROTOCOL: "what arrived is not HTTP",
}
_REASONS = {
    CLOSED: "it was closed here",
    pycurl.E_OK: "it ended within the header",
    FLOODED: "the endpoint sends data without end",
    pycurl.E_ABORTED_BY_CALLBACK: "it ended, or the endpoint sent data, before the request",
    pycurl.E_COULDNT_RESOLVE_HOST: "the host name was not found (DNS)",
    pycurl.E_COULDNT_RESOLVE_PROXY: "the proxy's host name was not found (DNS)",
    pycurl.E_GOT_NOTHING: "it ended without an answer",
    pycurl.E_SEND_FAIL_REWIND: "it ended without an answer",
}
_TLS = {
    pycurl.E_SSL_CONNECT_ERROR,
    pycurl.E_PEER_FAILED_VERIFICATION,
    pycurl.E_SSL_CERTPROBLEM,
    pycurl.E_SSL_CIPHER,
    pycurl.E_SSL_CACERT_BADFILE,
    pycurl.E_SSL_ISSUER_ERROR,
}
_TLS_REASON = re.compile(r"[^:]*: (?:error:\w+:[^:]*:[^:]*:)?([^']*)")


class HttpClient:
    """All calls of one process to ``FOLLOWUPS_TRANSPORT_URL``.

    The client opens at most one connection for each simultaneous call.
    """

    def __init__(self, settings: Settings, method: str = "POST", headers: Mapping[str, str] | None = None) -> None:
        """Store the limits and the headers of every request; no connection is opened yet.

        Raises `TransportConfigurationError` if the certificates or the proxy cannot be used.
        """
        self._timeout = settings.transport_timeout.total_seconds()
        self._endpoint = settings.transport_url or ""
        # If the endpoint cannot deduplicate, each connection is used only once. A connection that is kept open may
        # break just after a request was sent. With a reused connection, a follow-up could therefore fail needlessly
        # as outcome_unknown.
        reuses = settings.transport_deduplicates
        every = HEADERS | dict(headers or {}) | ({} if reuses else {"connection": "close"})
        self._headers = _lines(every)
        self._connection_options = connection_options(settings)
        # Counting TLS records takes 15 us per call. The bytes that a SOCKS or https proxy adds cannot be counted, so
        # unsolicited data may go unnoticed there.
        secure = self._endpoint.startswith("https:")
        proxy = str(self._connection_options[pycurl.PROXY]).lower()
        counts_records = secure and reuses and ("://" not in proxy or proxy.startswith("http:"))
        self._sockets = Sockets(uses_tls=secure, counts_records=counts_records)
        self._options = self._connection_options | {
            pycurl.POST: True,
            pycurl.CUSTOMREQUEST: method,
            pycurl.PATH_AS_IS: True,
            pycurl.BUFFERSIZE: READ_SIZE if counts_records or not (secure and reuses) else TLS_RECORD_SIZE,
            pycurl.MAXAGE_CONN: KEEPALIVE,
            pycurl.FORBID_REUSE: not reuses,
            pycurl.FRESH_CONNECT: not reuses,
        }
        limit = settings.concurrency
        self._multi_options = {
            pycurl.M_MAX_TOTAL_CONNECTIONS: limit,
            pycurl.M_MAXCONNECTS: limit,
            pycurl.M_MAX_CONCURRENT_STREAMS: STREAMS,
        }
        self._spare: list[Exchange] = []
        self._active: set[Exchange] = set()
        self._closed: asyncio.Event | None = None
        self._curls: CurlLoop | None = None
        self._retired: list[CurlLoop] = []
        self._sweeping: asyncio.TimerHandle | None = None
        self._used = 0.0

    async def open(self) -> None:
        """Prepare to connect in the running event loop; a second call has no effect."""
        if not self._is_open:
            self._closed = asyncio.Event()

    async def close(self) -> None:
        """Close the connections and end the calls in flight; later calls of `close` do nothing."""
        if self._closed is not None:
            self._closed.set()
        self._close_connections()

    @property
    def _is_open(self) -> bool:
        return self._closed is not None and not self._closed.is_set()

    async def deliver(self, url: str, headers: Sequence[bytes], body: bytes, dialect: Dialect) -> Outcome:
        """Make one request to the endpoint and return its outcome.

        ``url`` is absolute, ``headers`` are this request's header lines, and ``body`` is JSON in UTF-8.

        Raises `RuntimeError` if the client is not open. Whatever the endpoint does, no exception is raised.
        """
        if not self._is_open:
            message = "The transport is not open: await open() first."
            raise RuntimeError(message)
        try:
            curls = self._connections()  # first, because this discards the spare exchanges of a broken multi handle
        except _RESOURCE_ERRORS:
            return Snoozed(NO_RESOURCES)
        exchange = self._spare.pop() if self._spare else Exchange(self._options, self._sockets)
        until = uptime() + self._timeout
        exchange.prepare(url, [*self._headers, *headers], body, until)
        self._active.add(exchange)
        code = CLOSED
        try:
            code = await self._perform(exchange, curls, until)
            if code == pycurl.E_OPERATION_TIMEDOUT and exchange.may_have_been_sent and not exchange.answered:
                exchange.do_not_reuse()
            if exchange.flooded:
                code = FLOODED
            outcome = self._outcome(exchange, code, dialect)
        finally:
            self._active.discard(exchange)
            exchange.end()
            exchange.clear()
            if exchange.is_reusable:
                self._spare.append(exchange)
            self._used = uptime()
        if code == FLOODED and self._closed is not None:
            # An endpoint whose answers never end would otherwise get the next call, and could occupy the processor.
            await wait(self._closed, until - uptime())
        return outcome

    async def _perform(self, exchange: Exchange, curls: CurlLoop, until: float) -> int:
        """Perform the exchange on a usable connection, and return libcurl's result code."""
        refused = set()
        while True:
            try:
                code = await curls.perform(exchange.curl)
            finally:
                exchange.is_reusable = not curls.is_broken
            if curls.has_shut(exchange.descriptors):
                exchange.flooded = True
            if exchange.stale_address is None or not self._is_open:
                return code
            if exchange.stale_address in refused and self._curls is curls:
                # libcurl closes a stale connection that our callback rejects, except with HTTP/2.
                self._retire(curls)
            refused.add(exchange.stale_address)
            exchange.stale_address = None
            exchange.set_timeout(until)
            try:
                curls = self._connections()
            except _RESOURCE_ERRORS:
                return NO_RESOURCES_CODE

    async def check(self) -> str:
        """Connect as for a call, send nothing, and return a sentence that reports success.

        Raises `FollowUpsError` if the connection fails. The error contains the address without its password.
        """
        shown = hide_password(self._endpoint)
        sockets = Sockets(uses_tls=self._sockets.uses_tls, counts_records=False)
        exchange = Exchange(self._connection_options | {pycurl.CONNECT_ONLY: True}, sockets)
        exchange.prepare(self._endpoint, [], b"", uptime() + self._timeout)
        curls = CurlLoop({}, sockets.begin_action)
        try:
            code = await curls.perform(exchange.curl)
        finally:
            curls.close()
        if code == pycurl.E_OPERATION_TIMEDOUT:
            message = f"{shown} cannot be reached: no connection within {self._timeout:g} s."
            raise FollowUpsError(message)
        if code != pycurl.E_OK:
            reason = _reason(exchange, code)
            message = f"{shown} cannot be reached: {reason}; start it, or correct FOLLOWUPS_TRANSPORT_URL."
            raise FollowUpsError(message)
        how = "over TLS" if shown.startswith("https:") else "over TCP"
        return f"{shown} accepts connections {how}; no message was sent."

    def _outcome(self, exchange: Exchange, code: int, dialect: Dialect) -> Outcome:
        if not exchange.may_have_been_sent:
            return self._outcome_of_unsent(exchange, code)
        if exchange.has_status(code):
            return outcome_of(exchange.answer(code), dialect)
        if code == pycurl.E_OPERATION_TIMEDOUT:
            return Unknown(f"no answer within {self._timeout:g} s")
        if flaw := exchange.flaw or _INVALID_ANSWERS.get(code):
            return Unknown(f"no valid answer arrived ({flaw})")
        return Unknown(f"the connection broke before an answer arrived ({_reason(exchange, code)})")

    def _outcome_of_unsent(self, exchange: Exchange, code: int) -> Outcome:
        looked_up_in_vain = code in _LOOK_UP_FAILURES
        if code == NO_RESOURCES_CODE or not _can_open_files() or (looked_up_in_vain and not _can_start_threads()):
            return Snoozed(NO_RESOURCES)
        if code == pycurl.E_OPERATION_TIMEDOUT or exchange.late:
            return Retry(f"no connection within {self._timeout:g} s")
        return Retry(f"no connection: {_reason(exchange, code)}")

    # The following methods manage the connections. Connections are replaced after some seconds without a call. By
    # itself, libcurl closes an idle connection only at the next call. All connections are also replaced if libcurl
    # repeatedly selects an unusable one. A replaced connection finishes its calls in flight and gets no new ones.

    def _connections(self) -> CurlLoop:
        if self._curls is not None and self._curls.is_broken:
            self._retire(self._curls)
            self._spare.clear()  # a broken multi handle may keep transfers, and no other handle accepts these
        if self._curls is None:
            self._curls = CurlLoop(self._multi_options, self._sockets.begin_action)
        if self._sweeping is None:
            self._sweep_later()
        return self._curls

    def _retire(self, curls: CurlLoop) -> None:
        self._retired.append(curls)
        self._curls = None

    def _close_connections(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        self._close(self._loops)
        self._retired.clear()
        self._curls = None
        self._sockets.clear()

    def _close(self, loops: Collection[CurlLoop]) -> None:
        if loops:
            self._sockets.shut_unread()
        for each in loops:
            each.close()

    @property
    def _loops(self) -> list[CurlLoop]:
        return [*self._retired, self._curls] if self._curls else list(self._retired)

    def _sweep_later(self) -> None:
        self._sweeping = asyncio.get_running_loop().call_later(SWEEP_INTERVAL, self._sweep)

    def _sweep(self) -> None:
        self._sweep_later()
        self._end_floods()
        if self._curls is not None and not self._active and uptime() > self._used + KEEPALIVE:
            self._retire(self._curls)
        idle = [each for each in self._retired if each.is_idle]
        self._retired = [each for each in self._retired if not each.is_idle]
        self._close(idle)
        if not self._loops:
            self._close_connections()

    def _end_floods(self) -> None:
        flooded = self._sockets.flooded()
        for exchange in [each for each in self._active if each.address in flooded] if flooded else []:
            exchange.do_not_reuse()
            for each in self._loops:
                each.end(exchange.curl, FLOODED)
        for address in flooded:
            self._sockets.shut(address)


def _can_open_files() -> bool:
    """Return whether the process can open as many files as a new connection needs.

    libcurl does not report that a connection failed for lack of them.
    """
    opened: list[int] = []
    try:
        opened.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(FILES_PER_CONNECTION))
    except OSError:
        return False
    finally:
        for each in opened:
            os.close(each)
    return True


def _can_start_threads() -> bool:
    try:
        threading.Thread(target=bool, name="thread-limit", daemon=True).start()
    except RuntimeError:
        return False
    return True


def _lines(headers: Mapping[str, str]) -> list[bytes]:
    return [f"{name}: {value}".encode() for name, value in headers.items()]


def _reason(exchange: Exchange, code: int) -> str:
    """Return a short reason why there was no connection or no answer.

    The reason contains no address and no part of an answer.
    """
    curl = exchange.curl
    if exchange.flaw:
        return exchange.flaw
    if code in _REASONS:
        return _REASONS[code]
    if code in _TLS:
        said = _TLS_REASON.match(curl.errstr())
        return f"TLS failed ({said[1].strip() if said else pycurl.easy_strerror(code)})"
    if (status := curl.getinfo(pycurl.HTTP_CONNECTCODE)) and status // 100 != 2:  # noqa: PLR2004 - 2xx: the tunnel stands
        return f"the proxy answered HTTP {status}"
    number = curl.getinfo(pycurl.OS_ERRNO)
    return os.strerror(number) if number else str(pycurl.easy_strerror(code))

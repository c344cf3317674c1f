"""Serves the application with uvicorn, and bounds what a connection may cost before it becomes a request."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from followups.api import problems
from followups.api.access_log import SECURITY_HEADERS
from followups.api.gate import MAX_HEADER_SIZE, TOO_LONG_A_HEADER
from followups.api.listening import plain

if TYPE_CHECKING:
    import asyncio
    import socket

    from fastapi import FastAPI

PEER = "peer"
"""Key of the address that is connected to this process in a request's state, whatever its headers say."""

HEADER_WITHIN = 10.0
"""Seconds for the headers to arrive."""

MAX_CONNECTIONS = 2_000
"""Maximum number of open connections.

Beyond it, the connection that has been idle longest is closed, or the new one if none is idle.
"""

KEEP_ALIVE = 65
"""Seconds an idle connection is kept: longer than a load balancer's usual minute, so that the balancer closes first."""

GRACE = 20
"""Seconds that running requests have at shutdown."""


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol, which itself has no time limit for headers, and answers in plain text."""

    _header_due: asyncio.TimerHandle | None = None
    idle_since = 0.0
    """When the connection was made or its last response completed, on the loop's clock."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Make room if there are too many connections, and start the header timer."""
        if len(self.connections) >= MAX_CONNECTIONS and not self._close_idlest():
            transport.abort()
            return
        super().connection_made(transport)
        self.client = plain(self.client)
        self.app_state = {**self.app_state, PEER: self.client}
        self.idle_since = self.loop.time()
        self._expect_header()

    def on_response_complete(self) -> None:
        """Record when the connection became idle."""
        super().on_response_complete()
        self.idle_since = self.loop.time()

    def _close_idlest(self) -> bool:
        """Close the connection that has been idle longest, and return whether there was one."""
        idle = [
            one for one in self.connections if isinstance(one, LimitedProtocol) and one.conn.their_state is h11.IDLE
        ]
        if not idle:
            return False
        idlest = min(idle, key=lambda one: one.idle_since)
        self.connections.discard(idlest)
        idlest.transport.abort()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timer."""
        self._header_came()
        if self.transport is not None:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass data on; the timer runs on until the headers are complete."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_header()
        else:
            self._header_came()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has too long a header."""
        too_long = len(self.conn.trailing_data[0]) > MAX_HEADER_SIZE
        self._answer(TOO_LONG_A_HEADER if too_long else problems.of_status(400, msg))

    def _answer(self, problem: problems.ProblemAnswer) -> None:
        body = problem.body()
        own = {"content-type": problems.MEDIA_TYPE, "content-length": str(len(body)), "connection": "close"}
        head = list({**SECURITY_HEADERS, "cache-control": "no-store", **own}.items())
        response = h11.Response(status_code=problem.status, headers=head, reason=HTTPStatus(problem.status).phrase)
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_header(self) -> None:
        if self._header_due is None:
            self._header_due = self.loop.call_later(HEADER_WITHIN, self._header_is_late)

    def _header_came(self) -> None:
        if self._header_due is not None:
            self._header_due.cancel()
            self._header_due = None

    def _header_is_late(self) -> None:
        self._header_due = None
        if not self.transport.is_closing():
            self._answer(problems.of_status(408, f"The header did not arrive within {HEADER_WITHIN:g} seconds."))


def serve(app: FastAPI, sockets: list[socket.socket]) -> None:
    """Serve on these until SIGTERM or SIGINT."""
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,  # h11, with limits; by default uvicorn would use httptools if that is installed
        ws="none",
        lifespan="on",
        log_config=None,  # our own: one format for every line
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_SIZE,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
    )
    uvicorn.Server(config).run(sockets)

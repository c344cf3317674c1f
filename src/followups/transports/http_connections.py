"""The connections to one endpoint: made by aiohttp, kept here between two calls, never more than calls at once."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING

import aiohttp

from followups.transports.http_wire import Wire, connection_reset
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Mapping

    from yarl import URL

KEEPALIVE = 4.0
"""Seconds an idle connection is kept: less than the 5 s after which Node, uvicorn and Apache hang up by
default, since a request on a connection that is just being closed has an unknown outcome."""

# By default aiohttp rounds timeouts above 5 s up to whole seconds: the lease is not told. `take` has its own.
_UNBOUNDED = aiohttp.ClientTimeout(ceil_threshold=math.inf)


class Connections:
    """At most ``limit`` calls have a connection at once; what one leaves in order the next one gets.

    A new one is made only where none is idle, so that there are never more than ``limit``, idle ones included.
    """

    def __init__(self, endpoint: URL, headers: Mapping[str, str], limit: int, kept: float) -> None:
        """Be ready to connect in the running loop; an idle connection is kept for ``kept`` seconds, or never (0)."""
        self._loop = asyncio.get_running_loop()
        self._connector = aiohttp.TCPConnector(limit=limit, force_close=True)
        # Never sent itself: the connector wants to know by it where to, and it knows what the URL's headers are.
        self._origin = aiohttp.ClientRequest("GET", endpoint, headers=headers)
        self._kept = kept
        self._places = asyncio.Semaphore(limit)
        self._idle: deque[Wire] = deque()  # the one that was used last is the rightmost one
        self._sweeping: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def headers(self) -> Mapping[str, str]:
        """What each request is to carry: the given ones, and those that the endpoint's URL asks for."""
        return self._origin.headers

    async def take(self, until: float) -> Wire:
        """Return a connection, which goes back by `give`; ``until`` is an `uptime`.

        Raises what aiohttp does where none can be made, `TimeoutError` where none came in time.
        """
        if self._places.locked():
            async with asyncio.timeout(until - uptime()):
                await self._places.acquire()
        else:
            await self._places.acquire()
        try:
            wire = self._idle_one() or await self._new_one(until)
        except BaseException as error:
            self._places.release()
            if isinstance(error, asyncio.CancelledError) and self._closed and not _is_being_cancelled():
                raise aiohttp.ClientConnectionError from None  # by the connector, when it was closed
            raise
        return wire

    def give(self, wire: Wire) -> None:
        """Take a connection back after its call: the next one gets it if it is in order."""
        self._places.release()
        if not self._kept or self._closed or not wire.reusable:
            wire.close()
            return
        wire.since = uptime()
        self._idle.append(wire)
        if self._sweeping is None:
            self._sweep_after(self._kept)

    async def close(self) -> None:
        """Close them all, those in use too; again is harmless."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        closing = self._connector.close()
        while self._idle:
            self._idle.pop().close()
        await closing

    def _idle_one(self) -> Wire | None:
        oldest = uptime() - self._kept
        while self._idle:
            wire = self._idle.pop()
            # One that spoke is the call's to see: what is wrong with the receiver is not to go unnoticed.
            if wire.since >= oldest and (wire.spoke or (wire.reusable and wire.is_silent())):
                return wire
            wire.close()
        return None

    async def _new_one(self, until: float) -> Wire:
        async with asyncio.timeout(until - uptime()):
            wire = Wire(await self._connector.connect(self._origin, [], _UNBOUNDED))
        # A process that was frozen while it connected would write before it sees that its time is up, perhaps
        # after the follow-up was cancelled, or sent by another.
        if uptime() > until:
            wire.close()
            raise TimeoutError
        # One that has ended already would take the request, and leave open what became of it. Over TLS the first thing
        # that comes is the handshake's.
        if self._origin.url.scheme == "http" and not wire.is_silent() and not wire.spoke:
            wire.close()
            raise connection_reset()
        return wire

    def _sweep_after(self, seconds: float) -> None:
        self._sweeping = self._loop.call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        now = uptime()
        while self._idle and self._idle[0].since <= now - self._kept:
            self._idle.popleft().close()
        if self._idle:
            self._sweep_after(self._idle[0].since + self._kept - now)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

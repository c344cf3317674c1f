"""The API's rate limit: requests per API key and minute, counted in Redis for all `web` processes.

The limit keeps a burst of requests with one API key from slowing down requests with other keys. The service also works
correctly without the rate limit. If Redis is unreachable, requests are allowed, counted in a metric and logged. After a
failed query, Redis is not queried for a while, to avoid further timeouts.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from prometheus_client import Counter
from redis import RedisError
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError

from followups.errors import TooManyRequestsError
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from uuid import UUID

    from followups.settings import Settings

log = get_logger(__name__)

TIMEOUT = timedelta(milliseconds=200)
"""How long to wait for Redis, which normally answers in a tenth of a millisecond."""

PAUSE = timedelta(seconds=5)
"""After a failure, Redis is not queried for this long."""

UNLIMITED = Counter(
    "followups_rate_limit_unavailable_total",
    "Requests that were not counted against the limit, because Redis was unavailable.",
)


AHEAD_FOR = timedelta(seconds=1)
"""How long requests counted in advance for an API key remain valid."""

SHARE_AHEAD = 600
"""A process reserves at most a tenth of a second's requests: the limit per minute divided by 600."""


@dataclass(slots=True)
class Allowance:
    """Requests of one API key that are already counted in Redis but not yet served."""

    size: int
    left: int
    until: float


class KeyRateLimit:
    """A sliding-window rate limit for each API key.

    For a busy API key, a process reserves requests in advance, doubling the number each time. With a query to Redis for
    every request, creating a follow-up would take a tenth longer. If a key is idle or its limit is small, each request
    is counted when it arrives. An instance belongs to one event loop.
    """

    def __init__(self, settings: Settings) -> None:
        """Store the settings. The connection to Redis is opened on first use."""
        self._item = RateLimitItemPerMinute(settings.api_rate_limit or 1)
        self._off = settings.api_rate_limit == 0
        self._most_ahead = max(1, settings.api_rate_limit // SHARE_AHEAD)
        self._pool = ConnectionPool.from_url(
            settings.broker_url.get_secret_value(),
            socket_timeout=TIMEOUT.total_seconds(),
            socket_connect_timeout=TIMEOUT.total_seconds(),
            retry=Retry(NoBackoff(), 0),
            # Despite its name, `retry_on_error` causes no retry. With `retry_on_error`, a READONLY error closes the
            # connection. After a failover, a new connection to the same address reaches the new primary.
            retry_on_error=[ReadOnlyError],
        )
        # The client connects to the address of its connection pool. This URL is only parsed, but must contain a port.
        self._storage = RedisStorage(
            "redis://pool:6379",
            connection_pool=self._pool,  # type: ignore[arg-type] # as documented
            implementation="redispy",
            key_prefix=f"{settings.broker_prefix}rate",
        )
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)
        self._allowances: dict[UUID, Allowance] = {}
        self._counting: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self._ask_again_at = 0.0

    async def check(self, key_id: UUID) -> None:
        """Count a request made with the API key. Raises `TooManyRequestsError` if the key is over its limit."""
        if self._off:
            return
        if self._spend(key_id):
            return
        # For each API key, only one query at a time counts requests in Redis. If several requests of a key queried
        # Redis at the same time, each would reserve requests in advance. Of several simultaneous reservations, only the
        # last would be kept.
        async with self._counting.setdefault(key_id, asyncio.Lock()):
            if not self._spend(key_id):
                await self._count_or_pause(key_id)

    async def close(self) -> None:
        """Close the connections to Redis."""
        await self._pool.disconnect()

    def _spend(self, key_id: UUID) -> bool:
        """Use up one of the requests that have been counted in advance. Return False if no such request is left."""
        allowance = self._allowances.get(key_id)
        if allowance is None or not allowance.left or time.monotonic() >= allowance.until:
            return False
        allowance.left -= 1
        return True

    async def _count_or_pause(self, key_id: UUID) -> None:
        if time.monotonic() < self._ask_again_at:
            UNLIMITED.inc()
            return
        before = self._allowances.get(key_id)
        busy = before is not None and time.monotonic() < before.until
        try:
            wait = await self._count(key_id, min(2 * before.size, self._most_ahead) if before and busy else 1)
        except (RedisError, OSError) as error:
            self._pause(error)
            return
        if wait is not None:
            raise TooManyRequestsError(retry_after=min(max(wait, 1.0), 60.0))

    async def _count(self, key_id: UUID, size: int) -> float | None:
        """Count requests. Return None if the request is allowed, otherwise the number of seconds to wait."""
        name = str(key_id)
        for cost in (size, 1) if size > 1 else (1,):
            if await self._limiter.hit(self._item, name, cost=cost):
                until = time.monotonic() + AHEAD_FOR.total_seconds()
                self._allowances[key_id] = Allowance(cost, cost - 1, until)
                return None
        return (await self._limiter.get_window_stats(self._item, name)).reset_time - time.time()

    def _pause(self, error: Exception) -> None:
        UNLIMITED.inc()
        first = time.monotonic() >= self._ask_again_at
        self._ask_again_at = time.monotonic() + PAUSE.total_seconds()
        if first:
            log.warning("rate_limit_unavailable", error=type(error).__name__, pause_s=PAUSE.total_seconds())

"""Rate limits and the breaker, whose state all workers share in the broker's Redis.

No guarantee depends on the rate limits or the breaker. If Redis is unreachable, deliveries continue without rate limits
or the breaker. The failure is counted and logged. After a failed query, Redis is not queried for a while, because each
query would wait for a timeout. The rate limits and the breaker use this directory's Lua scripts. Redis runs only one
script at a time.
"""

from __future__ import annotations

from datetime import timedelta
from importlib.resources import files
from typing import TYPE_CHECKING

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError

if TYPE_CHECKING:
    from followups.settings import Settings

TIMEOUT = timedelta(milliseconds=200)
"""Time limit for an answer from Redis. Redis answers for a hundred follow-ups in about a millisecond."""

PAUSE = timedelta(seconds=5)
"""After a failure, Redis is not queried for this long."""


def connect(settings: Settings, timeout: timedelta = TIMEOUT) -> Redis:
    """Return a client for one event loop; it connects on first use."""
    return Redis.from_url(
        settings.broker_url.get_secret_value(),
        socket_timeout=timeout.total_seconds(),
        socket_connect_timeout=timeout.total_seconds(),
        retry=Retry(NoBackoff(), 0),
        # Despite its name, `retry_on_error` causes no retry here. It makes the client close a connection whose server
        # has become read-only, because the address may lead to another server after a failover.
        retry_on_error=[ReadOnlyError],
        decode_responses=True,
    )


def script(name: str) -> str:
    """Return the text of a Lua script."""
    return files("followups.flow_control").joinpath(name).read_text(encoding="utf-8")

"""What all workers know together and may forget: rate limits and the breaker, in the broker's Redis.

None of it guards a promise of ours. So where Redis is away, deliveries go on without, counted and logged, and Redis is
left alone for a while: asking costs a timeout. Each is a Lua script beside this file, since Redis runs one at a time.
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
"""How long Redis may take to answer; for a batch of a hundred it takes about a millisecond."""

PAUSE = timedelta(seconds=5)
"""How long Redis is not asked after it failed."""


def connect(settings: Settings, timeout: timedelta = TIMEOUT) -> Redis:
    """Return a client for one event loop; it connects to nothing yet."""
    return Redis.from_url(
        settings.broker_url.get_secret_value(),
        socket_timeout=timeout.total_seconds(),
        socket_connect_timeout=timeout.total_seconds(),
        retry=Retry(NoBackoff(), 0),
        # Not to try again: a connection that had it is closed. After a failover the address leads to another server.
        retry_on_error=[ReadOnlyError],
        decode_responses=True,
    )


def script(name: str) -> str:
    """Return the text of a Lua script."""
    return files("followups.shared").joinpath(name).read_text(encoding="utf-8")

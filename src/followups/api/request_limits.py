"""Limits on shared resources, per workspace and for all clients without a known API key together.

The shared resources are the database connections and the event loop.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakValueDictionary

from anyio import to_thread

from followups.errors import TooManyRequestsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

T = TypeVar("T")

SHARE = 6
"""How many of the pool's 8 database connections one workspace may use at the same time."""

WAITING_SHARE = 128
"""Maximum number of one workspace's requests, running or waiting: half of the process's limit."""

BUSY = 32
"""Once a workspace has `BUSY` running or waiting requests, its further requests are throttled."""

UNKNOWN_KEYS_SHARE = 2
"""Maximum number of database connections for looking up unknown API keys."""

KEPT = 1.0
"""The result of a health probe or a metrics scrape is reused for this many seconds."""

TOO_MANY_WAIT = "Too many requests of this workspace are waiting; try again shortly."
TOO_MANY_UNKNOWN_KEYS = "Too many requests whose keys are not yet checked are waiting; try again shortly."


class Throttle:
    """Lets one request pass in each iteration of the event loop, in order of arrival.

    All requests without a known API key share one throttle. Each busy workspace has a throttle of its own. Requests of
    a workspace that is not busy are not throttled.
    """

    def __init__(self) -> None:
        """Create the throttle, with no waiting requests."""
        self._lock = asyncio.Lock()

    async def __call__(self) -> None:
        """Wait until this request may proceed."""
        async with self._lock:
            await asyncio.sleep(0)


class RequestLimits:
    """The limits of each workspace: `SHARE` running requests, and `WAITING_SHARE` running or waiting requests."""

    def __init__(self) -> None:
        """Create the limits, without an entry for any workspace."""
        self.unknown_keys = RequestLimit(UNKNOWN_KEYS_SHARE, TOO_MANY_UNKNOWN_KEYS)
        self.throttle = Throttle()
        self._limits: WeakValueDictionary[UUID, RequestLimit] = WeakValueDictionary()

    def of(self, workspace_id: UUID) -> RequestLimit:
        """Return the workspace's limit, a context manager for each of its requests."""
        limit = self._limits.get(workspace_id)
        if limit is None:
            limit = self._limits[workspace_id] = RequestLimit()
        return limit


class RequestLimit:
    """A limit on one workspace's requests, or on all requests with an unknown API key.

    A request is counted from `acquire` until `release`. When used as a context manager, a limit waits for a free
    database connection.
    """

    def __init__(self, share: int = SHARE, refusal: str = TOO_MANY_WAIT) -> None:
        """Store the number of database connections, and the error message if too many requests wait."""
        self._semaphore = asyncio.Semaphore(share)
        self._throttle = Throttle()
        self._refusal = refusal
        self._inside = 0
        self.buffered = 0
        """The total size of the request bodies in memory, in bytes."""

    async def acquire(self) -> None:
        """Count a request. Raises `TooManyRequestsError` if the limit is already reached."""
        if self._inside >= BUSY:
            await self._throttle()
        if self._inside >= WAITING_SHARE:
            raise TooManyRequestsError(self._refusal)
        self._inside += 1

    def release(self) -> None:
        """Stop counting a request that has ended."""
        self._inside -= 1

    async def __aenter__(self) -> None:
        """Wait until one of the workspace's database connections is free."""
        await self._semaphore.acquire()

    async def __aexit__(self, *_: object) -> None:
        """Release the database connection, for the next waiting request."""
        self._semaphore.release()


class SharedResult(Generic[T]):
    """A result that is computed once for all simultaneous requests, and then reused for a while.

    Requests that find a recent result start no thread and cost little. An instance belongs to one event loop.
    """

    def __init__(self, compute: Callable[[], T], reused_for: float = KEPT) -> None:
        """Store the function that computes the result, and how many seconds a result is reused."""
        self._compute = compute
        self._reused_for = reused_for
        self._expires_at = 0.0
        self._task: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """Return the result. If the computation fails, its error is raised."""
        if self._task is None or (self._task.done() and time.monotonic() >= self._expires_at):
            self._task = asyncio.create_task(self._in_thread())
        return await asyncio.shield(self._task)

    async def _in_thread(self) -> T:
        result = await to_thread.run_sync(self._compute)
        self._expires_at = time.monotonic() + self._reused_for
        return result

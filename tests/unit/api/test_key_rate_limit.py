"""Tests of the API's rate limit with fakeredis; `integration/api/test_limits.py` uses a real server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
import redis
import time_machine
from fakeredis import FakeAsyncRedis, FakeServer

from followups.api import key_rate_limit
from followups.api.key_rate_limit import UNLIMITED, KeyRateLimit
from followups.errors import TooManyRequestsError
from followups.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = UUID(int=1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """Return the fake server to which every client of the test connects."""
    server = FakeServer()
    fake = FakeAsyncRedis(server=server).connection_pool
    monkeypatch.setattr(key_rate_limit.ConnectionPool, "from_url", lambda *_, **__: fake)
    return server


@pytest.fixture
def limit_of(server: FakeServer) -> Callable[[int], KeyRateLimit]:
    """Return a factory that creates one rate limit for each simulated process."""
    assert server.connected
    return lambda most: KeyRateLimit(
        load_settings(
            database_url="postgresql://nowhere/x",
            broker_url="redis://nowhere/0",
            transport_url="http://nowhere/",
            api_rate_limit=most,
        )
    )


async def allowed(limit: KeyRateLimit, requests: int, key: UUID = KEY) -> int:
    """Return how many of the given number of requests the limit allows."""
    number = 0
    waits: list[float] = []
    for _ in range(requests):
        try:
            await limit.check(key)
        except TooManyRequestsError as error:
            waits.append(error.retry_after)
        else:
            number += 1
    assert all(1 <= wait <= 60 for wait in waits)
    return number


async def test_each_key_has_the_limit(limit_of: Callable[[int], KeyRateLimit]) -> None:
    """Each API key has its own limit of requests per minute."""
    limit = limit_of(5)
    assert await allowed(limit, 9) == 5
    assert await allowed(limit, 9, uuid4()) == 5


async def test_processes_share_the_limit(limit_of: Callable[[int], KeyRateLimit]) -> None:
    """All processes share the rate limit of an API key; a limit of 0 allows every request."""
    assert await allowed(limit_of(5), 3) == 3
    assert await allowed(limit_of(5), 9) == 2
    assert await allowed(limit_of(0), 99) == 99


async def test_a_busy_key_is_counted_in_advance(limit_of: Callable[[int], KeyRateLimit], server: FakeServer) -> None:
    """For a busy API key, one call to Redis counts several requests in advance.

    The rate limit is never exceeded.
    """
    limit = limit_of(60_000)
    assert await allowed(limit, 1_000) == 1_000
    assert server.connected
    counted = sum(int(value) for value in await values(server))
    assert 1_000 <= counted <= 1_000 + limit._most_ahead  # noqa: SLF001 - the limit of requests counted in advance


async def test_simultaneous_requests_are_counted_once(
    limit_of: Callable[[int], KeyRateLimit], server: FakeServer
) -> None:
    """If requests of one API key run concurrently, each is counted once."""
    limit = limit_of(6_000)
    assert sum(await asyncio.gather(*(allowed(limit, 50) for _ in range(60)))) == 3_000
    counted = sum(int(value) for value in await values(server))
    assert 3_000 <= counted <= 3_000 + limit._most_ahead  # noqa: SLF001 - the limit of requests counted in advance


async def values(server: FakeServer) -> list[bytes]:
    """Return the values stored on the Redis server."""
    client = FakeAsyncRedis(server=server)
    found = [await client.get(name) for name in await client.keys()]
    await client.aclose()
    return found


async def test_the_window_slides(limit_of: Callable[[int], KeyRateLimit]) -> None:
    """If an API key has used up its limit, the whole limit is available again two minutes later."""
    with time_machine.travel("2030-01-31T09:00:00Z", tick=False) as now:
        limit = limit_of(5)
        assert await allowed(limit, 9) == 5
        now.shift(121)
        assert await allowed(limit, 9) == 5


async def test_without_redis_nothing_is_refused(
    limit_of: Callable[[int], KeyRateLimit], server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Redis is unreachable, requests are allowed and counted as unlimited.

    If a query to Redis fails, Redis is not queried again for a while.
    """
    limit = limit_of(5)
    server.connected = False
    before = UNLIMITED._value.get()  # noqa: SLF001 - the client has no public access
    assert await allowed(limit, 20) == 20
    assert UNLIMITED._value.get() - before == 20  # noqa: SLF001 - the client has no public access
    server.connected = True
    assert await allowed(limit, 20) == 20
    monkeypatch.setattr(limit, "_ask_again_at", 0.0)
    assert await allowed(limit, 20) == 5
    assert key_rate_limit.PAUSE.total_seconds() > 0


async def test_an_answer_that_is_an_error(
    limit_of: Callable[[int], KeyRateLimit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis server that returns an error, for example while loading data, counts as unreachable."""
    limit = limit_of(1)

    async def refuse(*_: object, **__: object) -> bool:
        raise redis.BusyLoadingError

    monkeypatch.setattr(limit._limiter, "hit", refuse)  # noqa: SLF001 - simulates the server's error
    assert await allowed(limit, 3) == 3

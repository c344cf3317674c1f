"""Tests of the Lua scripts for flow control on fakeredis; `integration` tests them on a real Valkey."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import fakeredis
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from followups import flow_control
from followups.flow_control.breaker import (
    CLOSED,
    BreakerStore,
    OutcomeReport,
    RecoveryPolicy,
    SharedState,
    WorkspaceOutcomes,
)
from followups.flow_control.limiter import Bucket, Limiter, LimiterReply, TokenRequest
from followups.settings import Settings, load_settings

if TYPE_CHECKING:
    from uuid import UUID

GO = timedelta(0)
START = datetime(2030, 1, 1, tzinfo=UTC)
FAILURES = 3
FAILING, WELL = 1, 2
"""The keys of two workspaces: one whose attempts fail, and one whose attempts succeed."""


@pytest.fixture
def server() -> fakeredis.FakeServer:
    """Return a Redis server used by this test alone."""
    return fakeredis.FakeServer()


@pytest.fixture
def own(server: fakeredis.FakeServer, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return settings whose broker URL connects to the fake server."""

    class Client(fakeredis.FakeAsyncRedis):
        @classmethod
        def from_url(cls, _url: str, **_: object) -> Client:
            return cls(server=server, decode_responses=True)

    monkeypatch.setattr(flow_control, "Redis", Client)
    return load_settings(
        database_url="postgresql://nobody@127.0.0.1:9/none",
        broker_url="redis://127.0.0.1:9/0",
        breaker_failures=FAILURES,
    )


def request(since: int, bucket: Bucket) -> TokenRequest:
    """Return the token request of a follow-up that is due the given number of seconds after the start."""
    return TokenRequest(uuid4(), START + timedelta(seconds=since), (bucket,))


def failed(*, key: int = FAILING, count: int = FAILURES) -> OutcomeReport:
    """Return a report of ``count`` different failed follow-ups of one workspace."""
    ids: tuple[UUID, ...] = tuple(uuid4() for _ in range(count))
    return OutcomeReport(ids, runs=(WorkspaceOutcomes(key, max(count, 5), after_success=False),))


async def test_a_bucket_and_its_queue(own: Settings) -> None:
    """A bucket's tokens, including returned ones, go to the queued requests in order."""
    limiter, bucket = Limiter(own), Bucket("all", rate=0.001, burst=2)
    requests = [request(since, bucket) for since in range(4)]
    answer = await limiter.ask(requests, ())
    assert [wait == GO for wait in answer.waits] == [True, True, False, False]
    assert answer.moment is not None
    await limiter.give_back(requests[:1], answer.moment)
    assert [wait == GO for wait in (await limiter.ask(requests[2:], ())).waits] == [True, False]


async def test_a_limiter_without_redis(own: Settings, server: fakeredis.FakeServer) -> None:
    """While Redis is unreachable, the limiter lets every follow-up begin."""
    server.connected = False
    bucket = Bucket("all", rate=0.001, burst=1)
    assert await Limiter(own).ask([request(0, bucket), request(1, bucket)], ()) == LimiterReply((GO, GO), None)


async def test_the_breaker_opens_and_recovers(own: Settings) -> None:
    """The breaker opens for a failing workspace, permits probes after its pause, and finally closes."""
    policy = RecoveryPolicy(first_pause=0.0, probes=2, first_rate=20, last_rate=20)
    store = BreakerStore(own, "http", policy)
    assert await store.report(failed(count=FAILURES - 1), 0) == SharedState(CLOSED)
    await store.report(OutcomeReport(runs=(WorkspaceOutcomes(WELL, 0, after_success=True),)), 0)
    opened = await store.report(failed(count=1), 0)
    assert opened == SharedState("open", 0, changed=True, tripped=frozenset({FAILING}))
    assert await store.report(OutcomeReport(), 9) == SharedState(
        "probing", 2, changed=True, tripped=frozenset({FAILING})
    )
    assert (await store.report(OutcomeReport(succeeded=True), 9)).state == "recovering"
    assert await store.report(OutcomeReport(), 9) == SharedState(CLOSED, changed=True)


async def test_the_breaker_without_redis(own: Settings, server: fakeredis.FakeServer) -> None:
    """While Redis is unreachable, the breaker's store raises an error."""
    server.connected = False
    with pytest.raises(RedisConnectionError):
        await BreakerStore(own, "http").report(OutcomeReport(), 0)

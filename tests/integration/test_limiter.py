"""Tests of token buckets and their queues on a real Valkey server, with the server's clock."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from redis.asyncio import Redis

from followups.flow_control import limiter as shared
from followups.flow_control.limiter import LONGEST_DEFERRAL, Bucket, Limiter, LimiterReply, TokenRequest
from followups.settings import Settings, load_settings
from followups.telemetry import metrics
from server_clock import ServerClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

PATIENCE = timedelta(seconds=10)
"""Seconds that Valkey may take to answer on a machine busy with other tests."""
START = datetime(2030, 1, 1, tzinfo=UTC)
GO = timedelta(0)
SLOW = 0.001
"""A rate in tokens per second. The rate is so low that no token is added during a test."""


@dataclass
class LimiterUnderTest:
    """A limiter that uses separate keys and records when each token was granted, in microseconds."""

    limiter: Limiter
    redis: Redis
    gone: list[int] = field(default_factory=list)

    async def ask(self, *requests: TokenRequest, ended: tuple[TokenRequest, ...] = ()) -> list[timedelta]:
        answer = await self.limiter.ask(requests, ended)
        assert answer.moment is not None
        self.gone += [answer.moment for wait in answer.waits if not wait]
        return list(answer.waits)


@pytest.fixture
def limiter_settings(broker_url: str) -> Settings:
    """Return settings for a limiter whose broker is reachable and whose database is not."""
    return load_settings(
        database_url="postgresql://nobody@127.0.0.1:9/none", broker_url=broker_url, broker_prefix=f"{uuid4().hex}:"
    )


@pytest.fixture
async def under_test(limiter_settings: Settings) -> AsyncIterator[LimiterUnderTest]:
    """Return a limiter whose buckets are full."""
    client = Redis.from_url(limiter_settings.broker_url.get_secret_value(), decode_responses=True)
    under_test = LimiterUnderTest(Limiter(limiter_settings, PATIENCE), client)
    yield under_test
    await under_test.limiter.close()
    await client.aclose()


def bucket(rate: float = SLOW, burst: int = 1, key: str = "") -> Bucket:
    """Return a token bucket that no other test uses."""
    return Bucket(key or uuid4().hex, rate, burst)


def request(since: int, *buckets: Bucket, id_: UUID | None = None) -> TokenRequest:
    """Return a token request for a follow-up due this many seconds after the start."""
    return TokenRequest(id_ or uuid4(), START + timedelta(seconds=since), buckets)


def assert_never_faster(moments: list[int], limit: Bucket) -> None:
    """Check that no period has more grants than a full bucket plus the tokens added in the period."""
    moments = sorted(moments)
    for first, start in enumerate(moments):
        for last in range(first, len(moments)):
            allowed = limit.burst + limit.rate * (moments[last] - start) / 1_000_000
            assert last - first + 1 <= allowed + 1e-6


@pytest.mark.parametrize(("rate", "burst"), [(100, 5), (300, 1), (40, 20)])
async def test_grants_never_exceed_the_rate(under_test: LimiterUnderTest, rate: float, burst: int) -> None:
    """Grants in any period never exceed the burst plus the tokens added in the period.

    The rate limiter grants requests in the order of the follow-ups' due dates.
    """
    limit = bucket(rate, burst)
    waiting = [request(number, limit) for number in range(60)]
    order = []
    while waiting:
        waits = await under_test.ask(*waiting)
        order += [one.since for one, wait in zip(waiting, waits, strict=True) if not wait]
        waiting = [one for one, wait in zip(waiting, waits, strict=True) if wait]
        await asyncio.sleep(0.005)
    assert order == sorted(order)
    assert_never_faster(under_test.gone, limit)


async def test_several_workers(under_test: LimiterUnderTest, limiter_settings: Settings) -> None:
    """If workers request and return tokens concurrently, their total rate stays within the limit."""
    limit = bucket(200, 4)
    others = [Limiter(limiter_settings, PATIENCE) for _ in range(3)]
    used: list[int] = []

    async def work(limiter: Limiter, number: int) -> None:
        for since in range(25):
            asked = request(since * 10 + number, limit)
            answer = await limiter.ask([asked], ())
            while answer.waits != (GO,):
                await asyncio.sleep(answer.waits[0].total_seconds())
                answer = await limiter.ask([asked], ())
            assert answer.moment is not None
            if since % 3:
                used.append(answer.moment)
            else:
                await asyncio.sleep(0.002)
                await limiter.give_back([asked], answer.moment)

    await asyncio.gather(*(work(limiter, number) for number, limiter in enumerate([under_test.limiter, *others])))
    for other in others:
        await other.close()
    assert_never_faster(used, limit)


async def test_earliest_due_first(under_test: LimiterUnderTest) -> None:
    """Follow-ups get tokens in the order of their due dates; ties are broken by id."""
    limit = bucket(rate=1 / 60, burst=1)
    await under_test.ask(request(0, limit))
    late, early = request(9, limit), request(5, limit)
    low, high = (request(7, limit, id_=UUID(int=number)) for number in (1, 2))
    await under_test.ask(late)
    await under_test.ask(high)
    await under_test.ask(early, low)
    waits = await under_test.ask(late, high, low, early)
    assert waits == sorted(waits, reverse=True)
    assert len(set(waits)) == 4


async def test_a_later_request_does_not_overtake(under_test: LimiterUnderTest) -> None:
    """A free token goes to the first waiting request, even if another request arrives."""
    limit = bucket(rate=5, burst=1)
    first, second, third = (request(since, limit) for since in (1, 2, 3))
    assert await under_test.ask(first) == [GO]
    (wait,) = await under_test.ask(second)
    assert wait > GO
    await asyncio.sleep(wait.total_seconds())
    assert (await under_test.ask(third))[0] > GO
    assert await under_test.ask(second) == [GO]


async def test_waiting_for_one_bucket_takes_no_other_token(under_test: LimiterUnderTest) -> None:
    """A follow-up that waits for its chat's limit takes no token from its workspace's bucket.

    A rate limit of one chat does not delay the workspace's other chats.
    """
    workspace, chat = bucket(burst=2), bucket()
    assert await under_test.ask(request(0, workspace, chat)) == [GO]
    assert (await under_test.ask(request(1, workspace, chat)))[0] > GO
    assert await under_test.ask(request(2, workspace, bucket())) == [GO]
    assert (await under_test.ask(request(3, workspace)))[0] > GO


async def test_the_strictest_limit_decides(under_test: LimiterUnderTest) -> None:
    """A follow-up that exceeds two rate limits waits as long as the stricter limit requires."""
    fast, slow = bucket(rate=1), bucket(rate=0.01)
    await under_test.ask(request(0, fast, slow))
    (wait,) = await under_test.ask(request(1, fast, slow))
    assert wait > timedelta(seconds=10)


async def test_a_long_wait_is_understated(under_test: LimiterUnderTest) -> None:
    """Short waits are stated exactly; long waits are understated, as earlier requests may be dropped."""
    limit = bucket(rate=0.01, burst=1)
    await under_test.ask(request(0, limit))
    waits = await under_test.ask(*(request(since, limit) for since in range(1, 4)))
    for turn, wait in zip((100, 200, 300), waits, strict=True):
        assert turn * 7 / 8 - 10 < wait.total_seconds() <= turn * 7 / 8
    exact = bucket(rate=2, burst=1)
    await under_test.ask(request(0, exact))
    (wait,) = await under_test.ask(request(1, exact))
    assert wait <= timedelta(seconds=0.5)


async def test_a_returned_token(under_test: LimiterUnderTest) -> None:
    """If a follow-up does not begin, its rate-limit token goes to the next request.

    A token bucket never holds more than its size.
    """
    limit = bucket(burst=2)
    first, second = request(0, limit), request(1, limit)
    answer = await under_test.limiter.ask([first, second], ())
    assert answer.moment is not None
    await under_test.limiter.give_back([first, second], answer.moment)
    await under_test.limiter.give_back([first, second], answer.moment)
    waits = await under_test.ask(*(request(since, limit) for since in range(2, 5)))
    # The bucket holds at most two tokens and has refilled slightly in the meantime. At least one of the two returned
    # tokens can be used.
    assert [wait == GO for wait in waits].count(True) <= 2
    assert waits[0] == GO


async def test_an_ended_follow_up_leaves_the_queue(under_test: LimiterUnderTest) -> None:
    """If a queued follow-up ends, the follow-up behind it moves up."""
    limit = bucket(rate=1 / 60, burst=1)
    await under_test.ask(request(0, limit))
    cancelled, second = request(1, limit), request(2, limit)
    _, before = await under_test.ask(cancelled, second)
    (after,) = await under_test.ask(second, ended=(cancelled,))
    assert after < before - timedelta(seconds=20)


async def test_an_abandoned_request_leaves_the_queue(under_test: LimiterUnderTest) -> None:
    """If a request for a token is not repeated in time, it loses its place in the queue."""
    limit = bucket(rate=10, burst=1)
    lost, second = request(1, limit), request(2, limit)
    await under_test.ask(request(0, limit))
    await under_test.ask(lost, second)
    for _ in range(100):
        waits = await under_test.ask(second)
        if waits == [GO]:
            break
        await asyncio.sleep(0.1)
    assert waits == [GO]
    assert (await under_test.ask(lost))[0] <= timedelta(seconds=0.1)


async def test_many_cancelled_requests_delay_others_briefly(under_test: LimiterUnderTest) -> None:
    """A worker repeats each waiting token request within five minutes.

    If a token request is not repeated, it delays other requests for at most five minutes.
    """
    limit = bucket(rate=1 / 3600, burst=1)
    cancelled = [request(since, limit) for since in range(50)]
    waits = await under_test.ask(*cancelled)
    assert max(waits) == LONGEST_DEFERRAL
    key = f"{under_test.limiter._prefix}{limit.key}"  # noqa: SLF001 - the test simulates elapsed time
    await under_test.redis.hset(key, "tokens", "1")
    for one in await under_test.redis.zrange(f"{key}:back", 0, -1):
        await under_test.redis.zincrby(
            f"{key}:back", -(LONGEST_DEFERRAL + timedelta(seconds=1)) / timedelta(microseconds=1), one
        )
    assert await under_test.ask(request(99, limit)) == [GO]


@pytest.fixture
def clock(limiter_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerClock]:
    """Return the time of Valkey."""
    clock = ServerClock(limiter_settings.broker_url.get_secret_value(), monkeypatch, shared)
    yield clock
    clock.close()


STEPS = [-timedelta(days=1), timedelta(minutes=-1), timedelta(minutes=1), timedelta(days=1)]


@pytest.mark.parametrize("step", STEPS, ids=str)
async def test_the_clock_is_set(clock: ServerClock, limiter_settings: Settings, step: timedelta) -> None:
    """If Redis's clock is changed, tokens are still added at the usual rate."""
    limiter = Limiter(limiter_settings, PATIENCE)
    limit = bucket(rate=1, burst=2)
    waiting = [request(since, limit) for since in range(9)]
    assert (await limiter.ask(waiting[:2], ())).waits == (GO, GO)
    clock.go_on(step.total_seconds())
    gone = []
    for _ in range(4):
        answer = await limiter.ask(waiting[2 + sum(gone) :], ())
        gone.append(answer.waits.count(GO))
        clock.go_on(1)
    await limiter.close()
    # three tokens were added over time, and up to two more when the clock was set forward
    assert 3 <= sum(gone) <= 5
    assert max(gone) <= limit.burst


@pytest.mark.parametrize("step", STEPS, ids=str)
async def test_an_abandoned_request_when_the_clock_is_set(
    clock: ServerClock, limiter_settings: Settings, step: timedelta
) -> None:
    """If Redis's clock jumps, a cancelled token request delays the next one by at most `LONGEST_DEFERRAL`."""
    limiter = Limiter(limiter_settings, PATIENCE)
    limit = bucket(rate=10, burst=1)
    lost, second = request(1, limit), request(2, limit)
    assert (await limiter.ask([request(0, limit)], ())).waits == (GO,)
    await limiter.ask([lost, second], ())
    clock.go_on(step.total_seconds())
    waited = timedelta(0)
    while (wait := (await limiter.ask([second], ())).waits[0]) and waited < LONGEST_DEFERRAL:
        waited += max(wait, timedelta(seconds=0.1))
        clock.go_on(max(wait.total_seconds(), 0.1))
    await limiter.close()
    assert waited < LONGEST_DEFERRAL


async def test_flushed(under_test: LimiterUnderTest) -> None:
    """After Redis has lost all its data and scripts, the limiter continues with full buckets."""
    limit = bucket(burst=3)
    assert await under_test.ask(*(request(since, limit) for since in range(3))) == [GO] * 3
    for key in await under_test.redis.keys(f"*{limit.key}*"):
        await under_test.redis.delete(key)
    await under_test.redis.script_flush()
    waits = await under_test.ask(*(request(since, limit) for since in range(4)))
    assert [wait == GO for wait in waits] == [True, True, True, False]


async def test_unused_keys_expire(under_test: LimiterUnderTest) -> None:
    """A limit's keys in Redis expire soon after its bucket is full and its queue is empty."""
    limit = bucket(rate=2, burst=4)
    await under_test.ask(*(request(since, limit) for since in range(9)))
    keys = await under_test.redis.keys(f"*{limit.key}*")
    assert len(keys) == 3
    for key in keys:
        assert 2_000 < await under_test.redis.pttl(key) < 10_000


async def test_the_queue_is_bounded(under_test: LimiterUnderTest) -> None:
    """Once a hundred thousand requests are queued, a further one gets an estimated wait but no place.

    Requests that are already in the queue keep their positions.
    """
    limit = bucket(rate=1000, burst=1)
    (key,) = [f"{under_test.limiter._prefix}{limit.key}:line"]  # noqa: SLF001 - the test fills the queue directly
    await under_test.ask(request(0, limit))
    full = {uuid4().hex: number for number in range(100_000)}
    await under_test.redis.zadd(key, full)
    (wait,) = await under_test.ask(request(10**6, limit))
    assert timedelta(seconds=80) < wait < timedelta(seconds=90)
    assert await under_test.redis.zcard(key) == 100_000


async def test_redis_unreachable(limiter_settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    """While Redis is unreachable, every follow-up may begin, and a metric counts these follow-ups.

    One log line reports the outage, and the limiter does not query Redis for a while.
    """
    nobody = limiter_settings.model_copy(
        update={"broker_url": type(limiter_settings.broker_url)("redis://127.0.0.1:9/0")}
    )
    limiter = Limiter(nobody)
    before = metrics.LIMITER_UNAVAILABLE._value.get()  # noqa: SLF001 - the client has no public access
    limit = bucket(burst=1)
    for _ in range(3):
        answer = await limiter.ask([request(0, limit), request(1, limit)], ())
        assert answer == LimiterReply((GO, GO), None)
    await limiter.close()
    assert metrics.LIMITER_UNAVAILABLE._value.get() - before == 6  # noqa: SLF001 - the client has no public access
    assert "".join(capfd.readouterr()).count("limiter_unavailable") == 1

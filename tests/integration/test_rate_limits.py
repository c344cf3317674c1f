"""Tests of rate limits in a worker's pipeline, with PostgreSQL and Valkey."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from followups.database import make_async_engine
from followups.delivery import upkeep
from followups.delivery.claim import claim
from followups.delivery.pipeline import Pipeline
from followups.flow_control.limiter import Limiter
from followups.session_settings import ONCE_PLANNED
from followups.store import pauses, rate_limits
from followups.store.rate_limits import LimitScope
from followups.transports.port import Retry, Sent
from stack import wait_until
from world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import Engine

    from followups.flow_control.limiter import LimiterReply, TokenRequest
    from followups.settings import Settings
    from followups.transports.port import Delivery, Outcome

PATIENCE = timedelta(seconds=10)
"""Seconds that Valkey may take to answer on a machine busy with other tests."""
PENDING = "SELECT count(*) FROM follow_ups WHERE status = 'pending'"
SECOND = timedelta(seconds=1)
NONE_COMES_IN = 1 / 86_400


class Receiver:
    """A transport that records each message it receives and the monotonic time of its arrival."""

    name = "receiver"

    def __init__(self, answer: Callable[[Delivery], Outcome] = lambda _: Sent()) -> None:
        self.answer = answer
        self.calls: list[tuple[UUID, float]] = []

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def check(self) -> str:
        return "ready"

    async def send(self, delivery: Delivery) -> Outcome:
        self.calls.append((delivery.follow_up_id, time.monotonic()))
        return self.answer(delivery)

    @property
    def received(self) -> list[UUID]:
        return [follow_up for follow_up, _ in self.calls]


class CountingLimiter(Limiter):
    """A limiter that counts requested and returned tokens."""

    asked = given_back = 0

    async def ask(self, requests: Sequence[TokenRequest], ended: Sequence[TokenRequest]) -> LimiterReply:
        self.asked += len(requests)
        return await super().ask(requests, ended)

    async def give_back(self, requests: Sequence[TokenRequest], moment: int) -> None:
        self.given_back += len(requests)
        await super().give_back(requests, moment)


@dataclass
class LimitedPipeline:
    """Pipelines with rate limiters; a thread claims due follow-ups for each pipeline."""

    engine: Engine
    settings: Settings
    pipelines: list[Pipeline] = field(default_factory=list)
    limiters: list[CountingLimiter] = field(default_factory=list)
    ticks: list[threading.Thread] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def start(self, transport: Receiver, **changes: Any) -> Pipeline:
        """Start a pipeline and submit the due follow-ups to it."""
        settings = self.settings.model_copy(update=changes)
        url = settings.database_url.get_secret_value()
        self.limiters.append(CountingLimiter(settings, PATIENCE))
        pipeline = Pipeline(
            settings, make_async_engine(url, options=ONCE_PLANNED), transport, limiter=self.limiters[-1]
        )
        pipeline.start()
        self.pipelines.append(pipeline)
        self.ticks.append(threading.Thread(target=self._tick, args=(pipeline, settings), daemon=True))
        self.ticks[-1].start()
        return pipeline

    def _tick(self, pipeline: Pipeline, settings: Settings) -> None:
        while not self.over.wait(0.05):
            if leases := claim(self.engine, settings).leases:
                pipeline.submit(leases)

    def stop(self) -> None:
        self.over.set()
        for tick in self.ticks:
            tick.join()
        for pipeline in self.pipelines:
            assert pipeline.drain(timedelta(seconds=10)) == 0


@pytest.fixture
def limited(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[LimitedPipeline]:
    """Return a `LimitedPipeline` that often reloads limits; drain its pipelines after the test."""
    monkeypatch.setattr(upkeep, "INTERVAL", 0.1)
    limited = LimitedPipeline(engine, settings.model_copy(update={"broker_prefix": f"{uuid4().hex}:"}))
    yield limited
    limited.stop()


def limit(world: World, rate: float, burst: int = 1, per: str = "all", channel: str | None = None) -> None:
    """Set a rate limit on the workspace."""
    with world.engine.begin() as connection:
        rate_limits.put(connection, LimitScope(world.workspace_id, channel, per), rate, burst)


def due_in_turn(world: World, count: int, ago: timedelta = SECOND) -> list[UUID]:
    """Insert follow-ups that became due one after the other, each in a separate chat."""
    moment = datetime.now(UTC) - 2 * ago
    return [
        world.follow_up(scheduled_at=moment - timedelta(days=1), due_date=moment + ago * number / count)
        for number in range(count)
    ]


def test_a_burst_is_sent_at_the_rate(world: World, limited: LimitedPipeline) -> None:
    """Sixty follow-ups that fall due in a burst are sent at the rate limit, earliest due first.

    No follow-up waits longer than the limit requires.
    """
    limit(world, 20)
    ids = due_in_turn(world, 60)
    receiver = Receiver()
    started = time.monotonic()
    limited.start(receiver)
    wait_until(lambda: world.scalar(PENDING) == 0, within=60)
    assert receiver.received == ids
    for number, (_, moment) in enumerate(receiver.calls, start=1):
        assert number <= 1 + 20 * (moment - started)
    rows = [world.row(one) for one in ids]
    assert {(row.status, row.attempts, row.snoozes, row.losses) for row in rows} == {("sent", 1, 0, 0)}
    assert not any(world.failures(one) for one in ids)


def test_an_unreadable_due_date(world: World, limited: LimitedPipeline) -> None:
    """A rate-limited follow-up with an unreadable due date does not delay other follow-ups.

    All follow-ups with a readable due date still count towards the limit.
    """
    limit(world, 1000, burst=10)
    world.alter("ALTER TABLE follow_ups DROP CONSTRAINT ck_follow_ups_times_are_readable")
    world.follow_up(scheduled_at=text("timestamptz 'infinity'"))
    due_in_turn(world, 4)
    limited.start(Receiver())
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert limited.limiters[0].asked == 4


def test_two_workers_share_a_limit(world: World, limited: LimitedPipeline) -> None:
    """Two workers together do not exceed the limit."""
    limit(world, 40, burst=4)
    due_in_turn(world, 60)
    receivers = Receiver(), Receiver()
    started = time.monotonic()
    for receiver in receivers:
        limited.start(receiver, batch_size=5)
    wait_until(lambda: world.scalar(PENDING) == 0, within=60)
    moments = sorted(moment for receiver in receivers for _, moment in receiver.calls)
    assert len(moments) == 60
    for number, moment in enumerate(moments, start=1):
        assert number <= 4 + 40 * (moment - started)


def test_unlimited_follow_ups_do_not_wait(world: World, limited: LimitedPipeline) -> None:
    """A follow-up to which no limit applies is sent immediately, without a request to Redis."""
    limit(world, NONE_COMES_IN, channel="widget")
    held = [world.follow_up(world.chat(channel="widget")) for _ in range(3)]
    other = type(world)(world.engine)
    free = [other.follow_up(other.chat(channel="widget")), world.follow_up(world.chat(channel="api"))]
    receiver = Receiver()
    limited.start(receiver)
    wait_until(lambda: set(free) <= set(receiver.received))
    wait_until(lambda: sum(world.row(one).limited_until is not None for one in held) == 2)
    assert len(receiver.received) == 3
    assert limited.limiters[0].asked == 3


def test_each_chat_has_its_own_limit(world: World, limited: LimitedPipeline) -> None:
    """A follow-up over its chat's rate limit waits without a lease or slot, and delays no other chat."""
    limit(world, NONE_COMES_IN, per="chat")
    limit(world, NONE_COMES_IN, burst=3)
    busy = world.chat()
    first, second = world.follow_up(busy, due=-2 * SECOND), world.follow_up(busy, due=-SECOND)
    receiver = Receiver()
    limited.start(receiver, concurrency=1)
    wait_until(lambda: world.row(second).limited_until)
    others = [world.follow_up() for _ in range(2)]
    wait_until(lambda: len(receiver.received) == 3)
    assert set(receiver.received) == {first, *others}
    row = world.row(second)
    assert (row.status, row.attempts, row.begun_at, row.lease_until) == ("pending", 0, None, None)
    assert row.next_attempt_at == row.limited_until > datetime.now(UTC)


def test_a_paused_follow_up_returns_its_token(world: World, limited: LimitedPipeline) -> None:
    """A paused follow-up does not use up a token."""
    limit(world, NONE_COMES_IN, burst=5)
    scope = pauses.PauseScope(world.workspace_id, None)
    with world.engine.begin() as connection:
        pauses.pause(connection, scope)
    ids = [world.follow_up() for _ in range(5)]
    receiver = Receiver()
    limited.start(receiver)
    wait_until(lambda: world.scalar("SELECT count(*) FROM follow_ups WHERE pause_id IS NOT NULL") == 5)
    wait_until(lambda: limited.limiters[0].given_back == 5)
    with world.engine.begin() as connection:
        pauses.resume(connection, scope)
        pauses.release_orphaned(connection)
    wait_until(lambda: set(receiver.received) == set(ids))


def test_a_parked_follow_up_returns_its_token(world: World, limited: LimitedPipeline) -> None:
    """A follow-up that waits for an earlier one in its chat returns its token."""
    limit(world, NONE_COMES_IN, burst=3)
    chat = world.chat()
    ids = world.follow_ups_at_once([(chat, -3 * SECOND), (chat, -2 * SECOND), (chat, -SECOND)])
    receiver = Receiver()
    limited.start(receiver)
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert receiver.received == ids


def test_each_attempt_takes_a_token(world: World, limited: LimitedPipeline) -> None:
    """Each attempt, including a retry, takes a token. No attempt is used up while a retry waits for its token."""
    limit(world, 5)
    follow_up = world.follow_up()
    receiver = Receiver(lambda delivery: Retry("HTTP 500") if delivery.attempt < 4 else Sent())
    started = time.monotonic()
    limited.start(receiver)
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert world.row(follow_up).attempts == 4
    for number, (_, moment) in enumerate(receiver.calls, start=1):
        assert number <= 1 + 5 * (moment - started)


def test_a_waiting_follow_up_ends_at_its_limit(world: World, limited: LimitedPipeline) -> None:
    """A waiting follow-up ends when it reaches its maximum lateness or its messaging window closes."""
    limit(world, NONE_COMES_IN)
    world.follow_up()
    closes_soon = datetime.now(UTC) - timedelta(days=1) + 2 * SECOND
    window = world.follow_up(world.chat(channel="whatsapp", last_user_message_at=closes_soon))
    late = world.follow_up()
    receiver = Receiver()
    limited.start(receiver, max_lateness=4 * SECOND)
    wait_until(lambda: world.scalar(PENDING) == 0, within=60)
    assert len(receiver.received) == 1
    assert (world.row(window).reason, world.row(late).reason) == ("window_closed", "too_late")


def test_cancelled_while_waiting(world: World, limited: LimitedPipeline) -> None:
    """A follow-up that is cancelled while waiting for a rate limit delays no other follow-up."""
    limit(world, 4)
    ids = due_in_turn(world, 12)
    receiver = Receiver()
    limited.start(receiver)
    wait_until(lambda: receiver.received)
    # Revoke the lease, as the API does; the worker still has the old lease in its due queue.
    world.sql(
        "UPDATE follow_ups SET status = 'cancelled', reason = 'x', finished_at = now(), lease_until = NULL"
        " WHERE id = ANY(:ids) AND status = 'pending' AND begun_at IS NULL",
        ids=ids[4:8],
    )
    wait_until(lambda: world.scalar(PENDING) == 0, within=60)
    assert receiver.received == [one for one in ids if world.row(one).status == "sent"]
    assert set(ids[:4]) | set(ids[8:]) <= set(receiver.received)


def test_set_and_removed_while_running(world: World, limited: LimitedPipeline) -> None:
    """Running workers soon notice that a rate limit was set or removed."""
    receiver = Receiver()
    pipeline = limited.start(receiver)
    world.follow_up()
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert limited.limiters[0].asked == 0
    limit(world, NONE_COMES_IN)
    wait_until(lambda: pipeline._rate_limits)  # noqa: SLF001 - waits until the limits are loaded
    ids = [world.follow_up() for _ in range(2)]
    wait_until(lambda: any(world.row(one).limited_until for one in ids))
    with world.engine.begin() as connection:
        assert rate_limits.clear(connection, LimitScope(world.workspace_id, None, "all"))
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert set(ids) <= set(receiver.received)


def test_a_raised_limit_releases_its_follow_ups(world: World, limited: LimitedPipeline) -> None:
    """If a channel's limit is raised, the follow-ups deferred by this limit are released.

    Follow-ups deferred under other limits stay deferred.
    """
    limit(world, NONE_COMES_IN, channel="widget")
    limit(world, NONE_COMES_IN, channel="api")
    receiver = Receiver()
    limited.start(receiver)
    widgets, others = [
        [world.follow_up(world.chat(channel=channel)) for _ in range(3)] for channel in ("widget", "api")
    ]
    waiting = "SELECT count(*) FROM follow_ups WHERE status = 'pending' AND limited_until = next_attempt_at"
    wait_until(lambda: world.scalar(waiting) == 4)
    limit(world, 1000, burst=10, channel="widget")
    wait_until(lambda: set(widgets) <= set(receiver.received))
    assert world.scalar(waiting) == 2
    assert len(set(others) & set(receiver.received)) == 1


def test_a_locked_row(world: World, limited: LimitedPipeline) -> None:
    """If a locked follow-up is over a rate limit, it is deferred soon after the lock is released."""
    limit(world, NONE_COMES_IN)
    _, second = due_in_turn(world, 2)
    receiver = Receiver()
    lease = {"lease": timedelta(minutes=10)}
    leases = claim(world.engine, limited.settings.model_copy(update=lease)).leases
    with world.engine.begin() as holder:
        holder.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": second})
        limited.start(receiver, **lease).submit(leases)
        wait_until(lambda: receiver.received)
    wait_until(lambda: world.row(second).limited_until)
    assert len(receiver.received) == 1


def test_an_unwritable_row(world: World, limited: LimitedPipeline) -> None:
    """If one follow-up's row cannot be written, other follow-ups are still deferred or sent."""
    limit(world, NONE_COMES_IN)
    first, bad, third = due_in_turn(world, 3)
    free = World(world.engine).follow_up()
    world.alter(f"ALTER TABLE follow_ups ADD CHECK (id <> '{bad}' OR lease_until IS NOT NULL) NOT VALID")
    receiver = Receiver()
    limited.start(receiver, lease=timedelta(minutes=10))
    wait_until(lambda: {first, free} <= set(receiver.received))
    wait_until(lambda: world.row(third).limited_until)
    assert bad not in receiver.received


def test_redis_unreachable(world: World, limited: LimitedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Redis is unreachable, all follow-ups are sent, whatever the limit."""
    monkeypatch.setattr(f"{__name__}.PATIENCE", timedelta(seconds=0.2))
    limit(world, NONE_COMES_IN)
    ids = due_in_turn(world, 30)
    receiver = Receiver()
    limited.start(receiver, broker_url=SecretStr("redis://127.0.0.1:9/0"))
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert set(receiver.received) == set(ids)

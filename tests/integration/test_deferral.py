"""Follow-ups that the breaker defers do not delay other follow-ups, and are eventually sent."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import redis
from sqlalchemy import text
from sqlalchemy.orm import Session

import followups
from followups.database import make_async_engine
from followups.delivery.claim import claim
from followups.delivery.dispatcher import Dispatcher
from followups.delivery.hints import leases_of
from followups.delivery.pipeline import Pipeline
from followups.flow_control.breaker import BreakerStore, RecoveryPolicy, read
from followups.flow_control.limiter import LONGEST_DEFERRAL
from followups.session_settings import ONCE_PLANNED
from followups.store import rate_limits
from followups.transports.port import Retry, Sent
from stack import wait_until
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.delivery.hints import Hint
    from followups.settings import Settings
    from followups.transports.port import Delivery, Outcome

SECOND = timedelta(seconds=1)
CONCURRENCY = 4
WINDOW = 64
OVERDUE = 200
FOR_LONG = RecoveryPolicy(first_pause=600, longest_pause=600)
QUICK = RecoveryPolicy(first_pause=0.05, longest_pause=0.2, first_rate=20, last_rate=200)
LEASED = "SELECT count(*) FROM follow_ups WHERE lease_until > now()"
PENDING = "SELECT count(*) FROM follow_ups WHERE status = 'pending'"


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return settings with a small in-flight limit, long leases, and separate broker keys."""
    changes = {
        "breaker_failures": 5,
        "broker_prefix": f"test-{uuid4().hex}:",
        "concurrency": CONCURRENCY,
        "max_in_flight": WINDOW,
        "lease": timedelta(minutes=5),
        "retry_base": timedelta(days=1),
        "retry_cap": timedelta(days=1),
    }
    return settings.model_copy(update=changes)


class SelectiveTransport:
    """A transport that accepts messages only from the workspaces in `well`; all other calls fail."""

    name = "http"

    def __init__(self, *well: World) -> None:
        self.well = {world.workspace_id for world in well}
        self.taken: list[UUID] = []

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def check(self) -> str:
        return "ready"

    async def send(self, delivery: Delivery) -> Outcome:
        await asyncio.sleep(0.001)
        if delivery.workspace_id not in self.well:
            return Retry("HTTP 500", status_code=500)
        self.taken.append(delivery.follow_up_id)
        return Sent()


@contextmanager
def worker(own: Settings, engine: Engine, chat: SelectiveTransport, policy: RecoveryPolicy) -> Iterator[None]:
    """Run a worker's components with dispatcher ticks; drain the pipeline at the end."""
    pipeline: Pipeline

    def submit(hint: Hint) -> None:
        pipeline.submit(leases_of(*hint))

    dispatcher = Dispatcher(own, engine, submit)
    in_loop = make_async_engine(own.database_url.get_secret_value(), options=ONCE_PLANNED)
    breaker = BreakerStore(own, "http", policy)
    pipeline = Pipeline(own, in_loop, chat, nudge=dispatcher.tick, breaker_store=breaker)
    pipeline.start()
    dispatcher.start()
    stopping = threading.Event()

    def beat() -> None:
        while not stopping.wait(own.tick_interval.total_seconds()):
            dispatcher.tick()

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        yield
    finally:
        stopping.set()
        beating.join()
        dispatcher.stop()
        unsettled = pipeline.drain(timedelta(seconds=10))
    assert unsettled == 0


def deferred(world: World) -> list[Any]:
    """Return the deferred follow-ups ordered by due date."""
    query = "SELECT * FROM follow_ups WHERE limited_until > now() ORDER BY due_date"
    with world.engine.connect() as connection:
        return list(connection.execute(text(query)))


def is_open(own: Settings) -> bool:
    """Return whether the breaker is open."""
    with redis.Redis.from_url(own.broker_url.get_secret_value()) as client:
        return read(client, own).state == "open"


def test_a_held_workspace_does_not_block_others(world: World, engine: Engine, own: Settings) -> None:
    """If a held workspace has many due follow-ups, other workspaces are not blocked."""
    theirs = World(engine)
    chat = SelectiveTransport(theirs)
    world.burst([-SECOND] * OVERDUE)
    with worker(own, engine, chat, FOR_LONG):
        wait_until(lambda: is_open(own))
        for _ in range(3):
            sent = theirs.burst([timedelta(0)] * 20)
            wait_until(lambda sent=sent: {row.status for row in theirs.rows(*sent)} == {"sent"})
        assert is_open(own)


def test_held_follow_ups_release_their_leases(world: World, engine: Engine, own: Settings) -> None:
    """A deferred follow-up has no lease, has used up no attempt, and can be cancelled."""
    world.burst([-SECOND] * OVERDUE)
    with worker(own, engine, SelectiveTransport(), FOR_LONG):
        wait_until(lambda: len(deferred(world)) > OVERDUE * 0.8)
        wait_until(lambda: world.scalar(LEASED) <= CONCURRENCY)
        rows = deferred(world)
        with Session(engine) as session:
            followups.cancel(session, rows[0].id, reason="over")
            session.commit()
    assert {(row.status, row.attempts, row.next_attempt_at) for row in rows} == {
        ("pending", 0, row.limited_until) for row in rows
    }
    moments = sorted(row.limited_until for row in rows)
    # the deferrals end at different times, but all of them soon
    assert len(rows) * 0.01 * SECOND < moments[-1] - moments[0] < LONGEST_DEFERRAL / 2
    assert world.row(rows[0].id).reason == "over"


def test_many_workers_lease_few_held_follow_ups(world: World, engine: Engine, own: Settings) -> None:
    """Each worker leases few follow-ups of a held workspace: less than a hundredth of the in-flight limit.

    A large number of slots does not increase a worker's share.
    """
    window = 1024
    world.burst([-SECOND] * OVERDUE)
    with worker(
        own.model_copy(update={"concurrency": 100, "max_in_flight": window}), engine, SelectiveTransport(), FOR_LONG
    ):
        wait_until(lambda: len(deferred(world)) > OVERDUE * 0.4)
        wait_until(lambda: world.scalar(LEASED) < window / 100)


def test_deferred_follow_ups_are_sent_after_the_recovery(world: World, engine: Engine, own: Settings) -> None:
    """Once the transport recovers, deferred follow-ups are sent before their deferral ends.

    The follow-ups due earliest are sent first.
    """
    chat = SelectiveTransport()
    world.burst([-SECOND * number for number in range(OVERDUE, 0, -1)])
    own = own.model_copy(update={"concurrency": 1})
    with worker(own, engine, chat, QUICK):
        wait_until(lambda: len(deferred(world)) > OVERDUE * 0.8)
        ids = [row.id for row in deferred(world)]
        chat.well.add(world.workspace_id)
        wait_until(lambda: set(ids) <= set(chat.taken))
    once = [
        id_ for id_ in ids if world.row(id_).attempts == 1
    ]  # a follow-up that failed as a probe before the recovery has more attempts
    assert once
    assert [id_ for id_ in chat.taken if id_ in set(once)] == once


def test_follow_ups_that_are_too_late_end(world: World, engine: Engine, own: Settings) -> None:
    """While the breaker is open, follow-ups end as soon as they are too late; only the next probes need permits."""
    ended = "SELECT max(finished_at - GREATEST(due_date, scheduled_at)) FROM follow_ups WHERE reason = 'too_late'"
    world.burst([-SECOND] * OVERDUE)
    with worker(own.model_copy(update={"max_lateness": 3 * SECOND}), engine, SelectiveTransport(), FOR_LONG):
        wait_until(lambda: len(deferred(world)) > OVERDUE * 0.5)
        wait_until(lambda: world.scalar(PENDING) <= CONCURRENCY)
        assert world.scalar(ended) < 8 * SECOND


def test_a_row_that_is_locked_is_deferred_later(world: World, engine: Engine, own: Settings) -> None:
    """A follow-up locked by another transaction keeps its lease, and is deferred once it is unlocked."""
    *_, last = world.burst([-SECOND * number for number in range(OVERDUE, 0, -1)])
    with engine.connect() as connection, worker(own, engine, SelectiveTransport(), FOR_LONG):
        wait_until(lambda: is_open(own))
        connection.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": last})
        wait_until(lambda: world.scalar(LEASED) <= CONCURRENCY + 1)
        connection.rollback()
        wait_until(lambda: last in {row.id for row in deferred(world)})


def test_a_row_that_cannot_be_written(world: World, engine: Engine, own: Settings) -> None:
    """If one follow-up's lease cannot be released, other follow-ups are still deferred and released."""
    *_, last = world.burst([-SECOND * number for number in range(OVERDUE, 0, -1)])
    world.alter(f"ALTER TABLE follow_ups ADD CHECK (id <> '{last}' OR lease_until IS NOT NULL) NOT VALID")
    with worker(own, engine, SelectiveTransport(), FOR_LONG):
        wait_until(lambda: len(deferred(world)) > OVERDUE * 0.8)
        wait_until(lambda: world.row(last).lease_until is not None)
        wait_until(lambda: world.scalar(LEASED) <= CONCURRENCY + 1)
    assert world.scalar(LEASED) == 1


class TestFreeing:
    """Deferred follow-ups of the given workspaces are released in the order of their deferral."""

    def free(self, engine: Engine, most: int, *worlds: World) -> int:
        """Release up to `most` deferred follow-ups of the given workspaces; return how many were released."""
        with engine.begin() as connection:
            return rate_limits.release_workspaces(
                connection, [one.workspace_id for one in worlds], LONGEST_DEFERRAL, most
            )

    def deferred(self, world: World, engine: Engine, settings: Settings, *seconds: int) -> list[UUID]:
        """Claim follow-ups, defer each by the given number of seconds, and return their ids."""
        ids = world.burst([-SECOND] * len(seconds))
        leases = [lease for lease in claim(engine, settings).leases if lease.id in ids]
        with engine.begin() as connection:
            waits = zip(leases, (SECOND * each for each in seconds), strict=True)
            rate_limits.defer_if_leased(connection, list(waits))
        return [lease.id for lease in leases]

    def test_released_in_the_order_of_deferral(self, world: World, engine: Engine, settings: Settings) -> None:
        """Follow-ups of the given workspaces are released in the order of their deferral, up to a limit."""
        other, third = World(engine), World(engine)
        mine = self.deferred(world, engine, settings, 10, 40)
        theirs = self.deferred(other, engine, settings, 20, 30)
        self.deferred(third, engine, settings, 5)
        assert self.free(engine, 3, world, other) == 3
        due = {lease.id for lease in claim(engine, settings).leases}
        assert due == {mine[0], *theirs}
        assert self.free(engine, 3, world, other) == 1
        assert self.free(engine, 3, world, other) == 0

    def test_release_leaves_other_rows_unchanged(self, world: World, engine: Engine, settings: Settings) -> None:
        """Releasing deferred follow-ups leaves retries unchanged and skips locked rows."""
        retry = world.follow_up(next_attempt_at=text("now() + interval '1 minute'"), attempts=1)
        locked, other = self.deferred(world, engine, settings, 10, 20)
        with engine.connect() as connection:
            connection.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": locked})
            assert self.free(engine, 10, world) == 1
        assert [world.row(one).next_attempt_at is None for one in (retry, locked, other)] == [False, False, True]

"""Tests of one worker's pipeline on PostgreSQL, with concurrent calls and a faulty transport."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from followups.database import make_async_engine
from followups.delivery import due_queue, settle
from followups.delivery.attempts import Begun
from followups.delivery.claim import claim
from followups.delivery.clock import DatabaseClock
from followups.delivery.pipeline import Pipeline
from followups.delivery.send import CallTimeout, send
from followups.delivery.slots import POISON_PILLS
from followups.flow_control.breaker import Breaker
from followups.session_settings import ONCE_PLANNED
from followups.store.leases import Lease
from followups.telemetry.logs import configure_logging
from followups.transports.port import Delivery, Rejected, Retry, Sent
from followups.uptime import uptime
from foreign import read_only
from stack import wait_until
from world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

    from followups.settings import Settings

END_OTHERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
     WHERE pid <> pg_backend_pid() AND usename = current_user AND datname = current_database()
"""
NO_BREAKER = Breaker(None, "http", 0)
PENDING = "SELECT count(*) FROM follow_ups WHERE status = 'pending'"
BEGUN = "SELECT count(*) FROM follow_ups WHERE status = 'pending' AND begun_at IS NOT NULL"


class ScriptedTransport:
    """A transport that returns scripted answers and counts the calls in progress."""

    name = "scripted"

    def __init__(self, answer: Callable[[Delivery], Any], seconds: float = 0.0) -> None:
        self.answer = answer
        self.seconds = seconds
        self.under_way = self.most = 0
        self.calls: Counter[str] = Counter()
        self.suspects: set[str] = set()
        self.suspects_under_way = 0

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def check(self) -> str:
        return "ready"

    async def send(self, delivery: Delivery) -> Any:
        self.calls[str(delivery.follow_up_id)] += 1
        self.under_way += 1
        self.suspects_under_way += str(delivery.follow_up_id) in self.suspects
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(self.seconds)
            return self.answer(delivery)
        finally:
            self.under_way -= 1
            self.suspects_under_way -= str(delivery.follow_up_id) in self.suspects


@pytest.fixture
def started(database_url: str, settings: Settings) -> Iterator[Callable[..., Pipeline]]:
    """Return a function that starts a pipeline; the pipeline is drained after the test."""
    pipelines: list[Pipeline] = []

    def start(transport: ScriptedTransport, **changes: Any) -> Pipeline:
        engine = make_async_engine(database_url, options=ONCE_PLANNED)
        pipeline = Pipeline(settings.model_copy(update=changes), engine, transport)
        pipeline.start()
        pipelines.append(pipeline)
        return pipeline

    yield start
    for pipeline in pipelines:
        assert pipeline.drain(timedelta(seconds=10)) == 0


def test_concurrent_calls(world: World, engine: Engine, settings: Settings, started: Callable[..., Pipeline]) -> None:
    """At most CONCURRENCY calls are in progress; a follow-up that waits for a slot has not begun."""
    transport = ScriptedTransport(lambda _: Sent(), 0.05)
    ids = [world.follow_up() for _ in range(30)]
    started(transport, concurrency=4).submit(claim(engine, settings).leases)
    most_begun = 0

    def done() -> bool:
        nonlocal most_begun
        most_begun = max(most_begun, world.scalar("SELECT count(*) FROM follow_ups WHERE begun_at IS NOT NULL"))
        return world.scalar(PENDING) == 0

    wait_until(done)
    assert transport.most == 4
    assert most_begun < 30
    assert transport.calls == Counter(map(str, ids))


def test_the_next_of_a_chat_is_locked(
    world: World, engine: Engine, settings: Settings, started: Callable[..., Pipeline]
) -> None:
    """If a chat's next follow-up is locked, it is sent once the lock is released."""
    chat = world.chat()
    first, second = world.follow_ups_at_once([(chat, timedelta(seconds=-2)), (chat, timedelta(seconds=-1))])
    patient = {"lease": timedelta(minutes=1), "transport_timeout": timedelta(seconds=20)}
    leases = claim(engine, settings.model_copy(update=patient)).leases
    transport = ScriptedTransport(lambda _: Sent(), 0.5)
    started(transport, **patient).submit(leases)
    wait_until(lambda: world.row(second).waits_for == first)
    with engine.connect() as other:
        other.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": second})
        wait_until(lambda: world.row(first).status == "sent")
        assert transport.calls == Counter([str(first)])
    wait_until(lambda: world.row(second).status == "sent")


def test_nothing_begins_without_a_slot(
    world: World, engine: Engine, settings: Settings, started: Callable[..., Pipeline]
) -> None:
    """No follow-up begins without a slot, even when calls finish quickly.

    A follow-up that waits for a slot can still be cancelled.
    """
    patient = {"lease": timedelta(minutes=1), "transport_timeout": timedelta(seconds=20)}
    long = settings.model_copy(update=patient)
    transport = ScriptedTransport(lambda _: Sent(), 0.002)
    pipeline = started(transport, concurrency=4, **patient)
    world.burst([timedelta(0)] * 60)
    pipeline.submit(claim(engine, long).leases)
    wait_until(lambda: world.scalar(PENDING) == 0)
    transport.seconds = 1.0
    world.burst([timedelta(0)] * 20)
    pipeline.submit(claim(engine, long).leases)
    wait_until(lambda: transport.under_way == 4)
    time.sleep(0.3)
    assert world.scalar(BEGUN) == 4


class BlockingTransport(ScriptedTransport):
    """A transport in which the calls of selected follow-ups wait until a test releases them."""

    def __init__(self, stuck: set[str]) -> None:
        super().__init__(lambda _: Sent())
        self.stuck = stuck

    async def send(self, delivery: Delivery) -> Any:
        self.under_way += 1
        try:
            while str(delivery.follow_up_id) in self.stuck:  # noqa: ASYNC110 - another thread ends the loop
                await asyncio.sleep(0.005)
            return await super().send(delivery)
        finally:
            self.under_way -= 1


def test_slow_calls_of_one_workspace(
    world: World, engine: Engine, settings: Settings, started: Callable[..., Pipeline]
) -> None:
    """A workspace whose calls never end uses at most seven eighths of the slots.

    Follow-ups of other workspaces are still sent.
    """
    patient = {"lease": timedelta(minutes=1), "transport_timeout": timedelta(seconds=30)}
    quiet, long = World(engine), settings.model_copy(update=patient)
    transport = BlockingTransport(set())
    pipeline = started(transport, concurrency=8, **patient)
    sent = "SELECT count(*) FROM follow_ups WHERE status = 'sent'"
    quiet.follow_up()
    pipeline.submit(claim(engine, long).leases)
    wait_until(lambda: world.scalar(sent) == 1)
    transport.stuck |= {str(one) for one in world.burst([timedelta(0)] * 20)}
    pipeline.submit(claim(engine, long).leases)
    wait_until(lambda: transport.under_way == 7)
    quiet.burst([timedelta(0)] * 5)
    pipeline.submit(claim(engine, long).leases)
    wait_until(lambda: world.scalar(sent) == 6)
    assert transport.under_way == 7
    transport.stuck.clear()
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert set(transport.calls.values()) == {1}


def test_doubled_and_shuffled_hints(
    world: World, engine: Engine, settings: Settings, started: Callable[..., Pipeline]
) -> None:
    """Each follow-up is sent once, even if hints are duplicated and arrive in any order."""
    transport = ScriptedTransport(lambda _: Sent())
    ids = [world.follow_up() for _ in range(30)]
    leases = claim(engine, settings).leases
    pipeline = started(transport)
    for batch in (leases[20:], leases, leases[:20], leases[::-1]):
        pipeline.submit(batch)
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert transport.calls == Counter(map(str, ids))


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: 1 / 0,
        lambda _: sys.exit(3),
        lambda _: (_ for _ in ()).throw(asyncio.CancelledError),
        lambda _: Rejected("no", HTTPStatus.FORBIDDEN),
        lambda _: None,
        lambda _: "sent",
        lambda _: Sent("not a UUID"),  # type: ignore[arg-type]
        lambda _: Rejected(None),  # type: ignore[arg-type]
        lambda _: Rejected("\x00\ud800", "403"),  # type: ignore[arg-type]
        lambda _: Retry("later", timedelta.max, 10**12),
        lambda _: Retry("later", -timedelta(seconds=1)),
        lambda _: Retry("later", 5),  # type: ignore[arg-type]
    ],
)
def test_bad_transport(
    world: World, engine: Engine, settings: Settings, started: Callable[..., Pipeline], answer: Callable[..., Any]
) -> None:
    """If a transport plug-in raises or answers wrongly, only that call's follow-up is affected.

    The affected follow-up is sent, or its failed attempt is recorded.
    """
    bad = world.follow_up(message="bad")
    good = [world.follow_up(message="good") for _ in range(10)]
    transport = ScriptedTransport(lambda delivery: answer(delivery) if delivery.message == "bad" else Sent())
    started(transport).submit(claim(engine, settings).leases)
    wait_until(lambda: all(world.row(one).status == "sent" for one in good))
    wait_until(lambda: world.row(bad).begun_at is None)
    row = world.row(bad)
    assert row.status == "sent" or world.failures(bad)


def test_a_plug_ins_error_reveals_no_message(
    world: World,
    engine: Engine,
    settings: Settings,
    started: Callable[..., Pipeline],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """If an error from a plug-in contains the message, the attempt and the log omit the message."""

    def raises(delivery: Delivery) -> None:
        raise RuntimeError(delivery.message)

    follow_up = world.follow_up(message="a secret between us")
    started(ScriptedTransport(raises)).submit(claim(engine, settings).leases)
    wait_until(lambda: world.failures(follow_up))
    assert "secret between us" not in str(world.failures(follow_up))
    assert "secret between us" not in "".join(capfd.readouterr())


def test_drain_releases_leases(
    world: World, engine: Engine, settings: Settings, started: Callable[..., Pipeline]
) -> None:
    """Draining settles the attempts in flight; all other follow-ups can be claimed again at once."""
    for _ in range(20):
        world.follow_up()
    transport = ScriptedTransport(lambda _: Sent(), 0.2)
    pipeline = started(transport, concurrency=5)
    pipeline.submit(claim(engine, settings).leases)
    wait_until(lambda: transport.under_way == 5)
    assert pipeline.drain(timedelta(seconds=10)) == 0
    assert world.scalar("SELECT count(*) FROM follow_ups WHERE status = 'sent'") == 5
    assert len(claim(engine, settings).leases) == 15


def test_full_disk(
    world: World,
    engine: Engine,
    settings: Settings,
    started: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If stderr cannot be written to, follow-ups are still sent and recorded."""

    def full(_: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for _ in range(10):
        world.follow_up()
    pipeline = started(ScriptedTransport(lambda _: Sent(), 0.02), concurrency=3)
    with monkeypatch.context() as patched:
        patched.setattr(sys.stderr, "write", full)
        pipeline.submit(claim(engine, settings).leases)
        wait_until(lambda: world.scalar(PENDING) == 0)
    assert world.scalar("SELECT count(*) FROM follow_ups WHERE status = 'sent'") == 10


def test_drain_while_begin_waits_for_slots(
    world: World,
    engine: Engine,
    settings: Settings,
    started: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a drain is requested while begin waits for free slots, no further attempt begins."""
    monkeypatch.setattr(due_queue, "GATHER", timedelta(seconds=1))
    for _ in range(20):
        world.follow_up()
    transport = ScriptedTransport(lambda _: Sent(), 0.3)
    pipeline = started(transport, concurrency=10)
    leases = claim(engine, settings).leases
    pipeline.submit(leases[:8])
    wait_until(lambda: transport.under_way == 8)
    pipeline.submit(leases[8:])  # only two slots are free, so begin waits for more free slots
    time.sleep(0.1)
    assert pipeline.drain(timedelta(seconds=10)) == 0
    assert transport.calls.total() == 8


def test_drained_without_a_database(
    world: World, engine: Engine, settings: Settings, database_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """If a drain ends before all sends are recorded, the unrecorded ones are counted and logged."""
    configure_logging("json", "info")  # an earlier test of this process may have chosen another format
    for _ in range(10):
        world.follow_up()
    away = pytest.MonkeyPatch()

    def answer(_: Delivery) -> Sent:
        away.setattr(settle, "settle", _raise_passing)
        return Sent()

    transport = ScriptedTransport(answer, 0.02)
    one_by_one = settings.model_copy(update={"concurrency": 1})
    pipeline = Pipeline(one_by_one, make_async_engine(database_url, options=ONCE_PLANNED), transport)
    pipeline.start()
    pipeline.submit(claim(engine, settings).leases)
    wait_until(lambda: transport.calls.total() == 10 and not transport.under_way)
    try:
        # long enough for the tasks of the last calls to resume on a busy machine
        assert pipeline.drain(timedelta(seconds=1)) == 10
        assert capfd.readouterr().err.count('"event":"attempt"') == 10
    finally:
        away.undo()
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert pipeline.drain(timedelta(seconds=10)) == 0


def _raise_passing(*_: object) -> None:
    statement = "settle"
    raise OperationalError(statement, {}, psycopg.OperationalError())


@pytest.mark.parametrize(
    ("count_once", "count_twice", "most"), [(0, 4, 1), (40, 0, POISON_PILLS), (20, 2, POISON_PILLS)]
)
def test_poison_pills_are_sent_alone(  # noqa: PLR0913 - fixtures and three parameters
    world: World,
    engine: Engine,
    settings: Settings,
    started: Callable[..., Pipeline],
    *,
    count_once: int,
    count_twice: int,
    most: int,
) -> None:
    """A follow-up with two lost leases is sent alone.

    Follow-ups that have lost one lease are sent only a few at a time. A follow-up that has lost no lease is sent at
    once.
    """
    under_way: list[int] = []
    suspects = {str(world.follow_up(losses=losses)) for losses in [1] * count_once + [2] * count_twice}
    others = [world.follow_up() for _ in range(8)]
    transport = ScriptedTransport(lambda _: under_way.append(transport.suspects_under_way) or Sent(), 0.02)
    transport.suspects = suspects
    started(transport).submit(claim(engine, settings).leases)
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert 1 <= max(under_way) <= most
    assert len(transport.calls) == len(suspects) + len(others)


def test_leases_that_expire_in_the_due_queue(
    world: World, engine: Engine, settings: Settings, started: Callable[..., Pipeline]
) -> None:
    """If leases expire in the due queue, each follow-up is still sent once."""
    short = settings.model_copy(update={"lease": timedelta(seconds=2.1), "transport_timeout": timedelta(seconds=0.1)})
    for _ in range(500):
        world.follow_up(due=-timedelta(seconds=1))
    transport = ScriptedTransport(lambda _: Sent(), 0.01)
    pipeline = started(transport, concurrency=1, lease=short.lease, transport_timeout=short.transport_timeout)
    end = uptime() + 30
    while world.scalar(PENDING) and uptime() < end:
        pipeline.submit(claim(engine, short).leases)
        time.sleep(0.1)
    assert world.scalar(PENDING) == 0
    assert max(transport.calls.values()) == 1


def test_briefly_read_only(
    world: World, engine: Engine, settings: Settings, started: Callable[..., Pipeline], database_url: str
) -> None:
    """If the database is briefly read-only, as during a failover, no result is lost."""
    plain = {"transport_deduplicates": False, "lease": timedelta(seconds=20)}
    ids = [world.follow_up() for _ in range(10)]
    transport = ScriptedTransport(lambda _: Sent(), 0.3)
    started(transport, **plain).submit(claim(engine, settings.model_copy(update=plain)).leases)
    wait_until(lambda: transport.under_way == len(ids))
    with read_only(database_url):
        world.sql(END_OTHERS)
        time.sleep(1)
    world.sql(END_OTHERS)
    wait_until(lambda: world.scalar(PENDING) == 0)
    assert {world.row(one).status for one in ids} == {"sent"}


async def test_not_sent_after_its_lease() -> None:
    """If a process is frozen until the follow-up's lease expires, the process does not send the message."""
    clock = DatabaseClock()
    clock.observe(datetime.now(UTC), uptime(), uptime())
    now = datetime.now(UTC)
    lease = Lease(uuid4(), 1, now)
    begun = Begun(lease, Delivery(lease.id, uuid4(), uuid4(), "api", None, uuid4(), "x", now, 1), 0)
    transport = ScriptedTransport(lambda _: Sent())
    limit = CallTimeout(timedelta(seconds=1))
    assert await send(transport, begun, clock, limit, uptime() - 0.001, NO_BREAKER) is None
    assert not transport.calls
    assert await send(transport, begun, clock, limit, uptime() + 60, NO_BREAKER) is not None

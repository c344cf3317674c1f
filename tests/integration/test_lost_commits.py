"""Tests of commits whose response is lost: delivery continues after success, failure and delay."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from commits import break_once
from followups.delivery.attempts import Attempt
from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.delivery.settle import settle
from followups.store import chat_order
from followups.store.counter_totals import CounterTotals, read
from followups.telemetry import metrics
from followups.transactions import transact
from followups.transports.port import Retry, Sent
from world import begun, claim_and_begin

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.delivery.attempts import BatchResult
    from followups.settings import Settings
    from followups.store.leases import Lease
    from followups.transports.port import Outcome
    from world import World

NUMBER = 3
PENDING = "SELECT count(*) FROM follow_ups WHERE status = 'pending'"


class DeliverySteps:
    """A few follow-ups, and the steps that deliver them."""

    def __init__(self, world: World, settings: Settings) -> None:
        """Create a few due follow-ups."""
        self.world, self.settings = world, settings
        self.ids = {world.follow_up() for _ in range(NUMBER)}

    def leases(self) -> list[Lease]:
        """Claim the follow-ups and return their leases."""
        leases = claim(self.world.engine, self.settings).leases
        assert {lease.id for lease in leases} == self.ids
        return list(leases)

    def attempts(self, outcome: Outcome) -> list[Attempt]:
        """Claim and begin the follow-ups; return the attempts, each with the given outcome."""
        beginning = claim_and_begin(self.world.engine, self.settings)
        assert begun(beginning) == self.ids
        return [Attempt(one, outcome, 0.0, time.monotonic(), 0.0) for one in beginning.begun]

    def rows(self) -> dict[UUID, tuple[Any, ...]]:
        """Return the rows of the follow-ups in the database, by id."""
        columns = ("status", "reason", "lease_token", "lease_until", "begun_at", "attempts", "next_attempt_at")
        rows = map(self.world.row, self.ids)
        return {row.id: tuple(getattr(row, name) for name in columns) for row in rows}


def claiming(delivery: DeliverySteps) -> Callable[[], set[UUID]]:
    """Return a function that claims the follow-ups."""
    return lambda: {lease.id for lease in claim(delivery.world.engine, delivery.settings).leases}


def beginning(delivery: DeliverySteps) -> Callable[[], set[UUID]]:
    """Return a function that begins the given follow-ups, which have already been claimed."""
    leases = delivery.leases()
    return lambda: begun(begin(delivery.world.engine, delivery.settings, leases))


def ending(delivery: DeliverySteps) -> Callable[[], set[UUID]]:
    """Return a function that calls begin; all follow-ups then end because their users have replied."""
    leases = delivery.leases()
    delivery.world.sql("UPDATE chats SET last_message_role = 'user'")

    def ended(result: BatchResult) -> set[UUID]:
        return {row_id for row_id, _ in result.ended}

    return lambda: ended(begin(delivery.world.engine, delivery.settings, leases))


def unblocking(delivery: DeliverySteps) -> Callable[[], set[UUID]]:
    """Return a function that unblocks follow-ups whose chats have no earlier follow-up left."""
    world = delivery.world
    world.sql(
        "INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id, status, reason,"
        " finished_at) SELECT workspace_id, chat_id, message, due_date - interval '1 s', trigger_chat_message_id,"
        " 'failed', 'x', now() FROM follow_ups"
    )
    world.sql(
        "UPDATE follow_ups f SET waits_for = e.id FROM follow_ups e"
        " WHERE f.status = 'pending' AND e.status = 'failed' AND e.chat_id = f.chat_id"
    )
    ended = list(world.scalar("SELECT array_agg(id) FROM follow_ups WHERE status = 'failed'"))
    work = partial(chat_order.unblock_writable, ended=ended, lease=timedelta(minutes=1))
    return lambda: {lease.id for lease in transact(world.engine, work)[0]}


def settling(delivery: DeliverySteps, outcome: Outcome) -> Callable[[], set[UUID]]:
    """Return a function that settles the attempts with the given outcome."""
    attempts = delivery.attempts(outcome)
    return lambda: {one.id for one in settle(delivery.world.engine, delivery.settings, attempts).settled}


STEPS = {
    "claim": claiming,
    "begin": beginning,
    "ended by begin": ending,
    "sent": lambda delivery: settling(delivery, Sent()),
    "unblocked": unblocking,
    "tried again": lambda delivery: settling(delivery, Retry("busy")),
}


@pytest.fixture
def delivery(world: World, settings: Settings) -> DeliverySteps:
    """Return an object that creates due follow-ups and delivers them step by step."""
    return DeliverySteps(world, settings)


@pytest.mark.parametrize("name", STEPS)
def test_answer_lost_after_the_commit(delivery: DeliverySteps, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If only the commit's response is lost, the delivery step counts as done."""
    step = STEPS[name](delivery)
    break_once(monkeypatch, psycopg.Connection.commit)
    before = delivery.rows()
    assert step() == delivery.ids
    assert all(now != before[row_id] for row_id, now in delivery.rows().items())


@pytest.mark.parametrize("name", STEPS)
def test_commit_lost(delivery: DeliverySteps, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a COMMIT never reaches the server, the step fails immediately and can be repeated."""
    step = STEPS[name](delivery)
    before = delivery.rows()
    break_once(monkeypatch, lambda _: None)
    started = time.monotonic()
    with pytest.raises(OperationalError):
        step()
    assert time.monotonic() - started < 10
    assert delivery.rows() == before
    assert step() == delivery.ids


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("committed", [True, False])
def test_slow_commit(delivery: DeliverySteps, name: str, monkeypatch: pytest.MonkeyPatch, *, committed: bool) -> None:
    """If a commit's outcome is unknown, the database is queried once the server has ended the transaction."""
    step = STEPS[name](delivery)
    commit, rollback = psycopg.Connection.commit, psycopg.Connection.rollback
    ended = threading.Event()

    def linger(connection: psycopg.Connection) -> None:
        monkeypatch.setattr(psycopg.Connection, "commit", commit)

        def end() -> None:
            ended.set()
            (commit if committed else rollback)(connection)

        threading.Timer(0.5, end).start()
        message = "the connection broke"
        raise psycopg.OperationalError(message)

    monkeypatch.setattr(psycopg.Connection, "commit", linger)
    if committed:
        assert step() == delivery.ids
    else:
        with pytest.raises(OperationalError):
            step()
    assert ended.is_set()


def test_taken_over_meanwhile(delivery: DeliverySteps, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the response to a begin is lost and another worker begins the attempt, the first begin fails."""
    leases = delivery.leases()
    engine = delivery.world.engine

    def other(connection: psycopg.Connection) -> None:
        connection.rollback()
        assert begun(begin(engine, delivery.settings, leases)) == delivery.ids

    break_once(monkeypatch, other)
    with pytest.raises(OperationalError):
        begin(engine, delivery.settings, leases)


@pytest.mark.parametrize("committed", [True, False])
def test_counts(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, committed: bool) -> None:
    """If the connection breaks at the commit, the transaction's counts are still added exactly once."""
    totals = CounterTotals(engine)
    totals.add()
    with engine.connect() as connection:
        before = read(connection)
    metrics.CLAIMED.inc(3)
    break_once(monkeypatch, psycopg.Connection.commit if committed else lambda _: None)
    if committed:
        totals.add()
    else:
        with pytest.raises(OperationalError):
            totals.add()
    totals.add()
    sample = ("followups_claimed_total", "{}")
    with engine.connect() as connection:
        assert read(connection)[sample] == before.get(sample, 0) + 3

"""Each step of a delivery goes on as if nothing had been, whether its commit was done, was not, or takes its time."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from commits import break_once
from followups.dispatch.begin import begin
from followups.dispatch.claim import claim
from followups.dispatch.send import Attempt
from followups.dispatch.settle import settle
from followups.store.totals import Totals, read
from followups.telemetry import metrics
from followups.transports.port import Retry, Sent
from world import begun, claim_and_begin

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.dispatch.begin import Beginning
    from followups.settings import Settings
    from followups.store.leases import Lease
    from followups.transports.port import Outcome
    from world import World

NUMBER = 3
PENDING = "SELECT count(*) FROM follow_ups WHERE status = 'pending'"


class Place:
    """Some follow-ups, and the steps of their delivery."""

    def __init__(self, world: World, settings: Settings) -> None:
        """Let some fall due."""
        self.world, self.settings = world, settings
        self.ids = {world.follow_up() for _ in range(NUMBER)}

    def leases(self) -> list[Lease]:
        """Claim them."""
        leases = claim(self.world.engine, self.settings).leases
        assert {lease.id for lease in leases} == self.ids
        return list(leases)

    def attempts(self, outcome: Outcome) -> list[Attempt]:
        """Claim and begin them, and let all of them come to this."""
        beginning = claim_and_begin(self.world.engine, self.settings)
        assert begun(beginning) == self.ids
        return [Attempt(one, outcome, timedelta(0), time.monotonic(), datetime.now(UTC)) for one in beginning.begun]

    def rows(self) -> dict[UUID, tuple[Any, ...]]:
        """Return what the database holds of them."""
        columns = ("status", "reason", "lease_token", "lease_until", "begun_at", "attempts", "next_attempt_at")
        rows = map(self.world.row, self.ids)
        return {row.id: tuple(getattr(row, name) for name in columns) for row in rows}


def claiming(place: Place) -> Callable[[], set[UUID]]:
    """Return the claim."""
    return lambda: {lease.id for lease in claim(place.world.engine, place.settings).leases}


def beginning(place: Place) -> Callable[[], set[UUID]]:
    """Return the begin."""
    leases = place.leases()
    return lambda: begun(begin(place.world.engine, place.settings, leases))


def ending(place: Place) -> Callable[[], set[UUID]]:
    """Return a begin that ends all of them, since their users have replied."""
    leases = place.leases()
    place.world.sql("UPDATE chats SET last_message_role = 'user'")

    def ended(result: Beginning) -> set[UUID]:
        return {row_id for row_id, _ in result.ended}

    return lambda: ended(begin(place.world.engine, place.settings, leases))


def settling(place: Place, outcome: Outcome) -> Callable[[], set[UUID]]:
    """Return the settle."""
    attempts = place.attempts(outcome)
    return lambda: {one.id for one in settle(place.world.engine, place.settings, attempts).settled}


STEPS = {
    "claim": claiming,
    "begin": beginning,
    "ended by begin": ending,
    "sent": lambda place: settling(place, Sent()),
    "tried again": lambda place: settling(place, Retry("busy")),
}


@pytest.fixture
def place(world: World, settings: Settings) -> Place:
    """Return follow-ups that are due."""
    return Place(world, settings)


@pytest.mark.parametrize("name", STEPS)
def test_an_answer_is_lost_after_the_commit(place: Place, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was committed counts as done."""
    step = STEPS[name](place)
    break_once(monkeypatch, psycopg.Connection.commit)
    before = place.rows()
    assert step() == place.ids
    assert all(now != before[row_id] for row_id, now in place.rows().items())


@pytest.mark.parametrize("name", STEPS)
def test_a_commit_is_lost(place: Place, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not committed counts as failed at once, and can be done again."""
    step = STEPS[name](place)
    before = place.rows()
    break_once(monkeypatch, lambda _: None)
    started = time.monotonic()
    with pytest.raises(OperationalError):
        step()
    assert time.monotonic() - started < 10
    assert place.rows() == before
    assert step() == place.ids


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_takes_its_time(place: Place, name: str, monkeypatch: pytest.MonkeyPatch, *, committed: bool) -> None:
    """While the server may still be at it, neither is believed; then the database tells."""
    step = STEPS[name](place)
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
        assert step() == place.ids
    else:
        with pytest.raises(OperationalError):
            step()
    assert ended.is_set()


def test_taken_over_meanwhile(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another worker began meanwhile, after the same hint, is not taken for one's own."""
    leases = place.leases()
    engine = place.world.engine

    def other(connection: psycopg.Connection) -> None:
        connection.rollback()
        assert begun(begin(engine, place.settings, leases)) == place.ids

    break_once(monkeypatch, other)
    with pytest.raises(OperationalError):
        begin(engine, place.settings, leases)


@pytest.mark.parametrize("committed", [True, False])
def test_counts(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, committed: bool) -> None:
    """Counts are added once, whether the answer was lost after the commit or before it."""
    totals = Totals(engine)
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

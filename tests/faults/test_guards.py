"""For each SQL guard, a scenario that breaks a promise if and only if the guard is missing."""

from __future__ import annotations

from datetime import datetime, timedelta
from math import inf
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from faults import guards
from faults.guards import PromiseBroken, Scene, without
from followups.delivery.attempts import Begun
from followups.delivery.clock import DatabaseClock
from followups.delivery.send import CallTimeout, send
from followups.flow_control.breaker import Breaker
from followups.store.fragments import LATENESS_FROM, NEXT_TOKEN
from followups.transports.port import Delivery, Sent
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from followups.settings import Settings
    from followups.store.leases import Lease
    from world import World

BEGIN, SETTLE, CLAIM = "SET begun_at = now()", "WITH r AS MATERIALIZED", "WITH head AS MATERIALIZED"
NO_BREAKER = Breaker(None, "http", 0)
FAIRLY = "first_look AS MATERIALIZED"
DEFER = "limited_until = leased.again"
TOKEN = "AND f.lease_token = b.token"  # noqa: S105 - a fencing token
NO_LOCK = {
    "FOR NO KEY UPDATE SKIP LOCKED": "",
    # A statement that waits for the row lock detects a changed row by its ctid, so either guard alone is enough.
    "WHERE f.ctid = taken.place": "WHERE f.id = (SELECT id FROM follow_ups WHERE ctid = taken.place)",
}
BEGUN_ORM = " AND follow_ups.begun_at IS NULL"


class Guard(NamedTuple):
    """A guard: the statements that contain it, its replacements, and the scenario that fails without it."""

    within: str
    cuts: dict[str, str]
    scenario: Callable[[Scene], None]


CATALOGUE = {
    "token at begin": Guard(BEGIN, {TOKEN: ""}, guards.stale_hint_begins),
    "begun at begin": Guard(BEGIN, {"AND f.begun_at IS NULL": ""}, guards.repeated_hint_begins),
    "lease at begin": Guard(BEGIN, {"AND f.lease_until > now()": ""}, guards.ended_lease_begins),
    # Either guard alone is enough here, because a cancel also revokes the lease.
    "pending and lease at begin": Guard(
        BEGIN, {"AND f.finished_at IS NULL": "", "AND f.lease_until > now()": ""}, guards.cancelled_begins
    ),
    "order at begin": Guard(BEGIN, {"e.status = 'pending'": "false"}, guards.later_one_begins),
    "silence at begin": Guard(
        BEGIN,
        {"COALESCE(c.last_message_role = 'user', false)": "false"},
        guards.begins_in(lambda scene: scene.world.chat(last_message_role="user")),
    ),
    "takeover at begin": Guard(
        BEGIN,
        {"c.last_message_role = 'operator'": "false"},
        guards.begins_in(
            lambda scene: scene.world.chat(last_message_role="operator"), scheduled_at="2020-01-01T00:00:00Z"
        ),
    ),
    "removed chat at begin": Guard(
        BEGIN,
        {"c.removed_at IS NOT NULL": "false"},
        guards.begins_in(lambda scene: scene.world.chat(removed_at="2020-01-01T00:00:00Z")),
    ),
    "window at begin": Guard(
        BEGIN,
        {"c.channel = ANY(": "false AND c.channel = ANY("},
        guards.begins_in(lambda scene: scene.world.chat(channel="whatsapp")),
    ),
    "lateness at begin": Guard(
        BEGIN,
        {f"now() >= {LATENESS_FROM}": "now() < '-infinity'::timestamptz"},
        guards.begins_in(lambda scene: scene.world.chat(), due=-timedelta(days=3), scheduled_at="2020-01-01T00:00:00Z"),
    ),
    "pause at begin": Guard(
        BEGIN, {"SELECT EXISTS (SELECT FROM pauses WHERE ended_at IS NULL)": "SELECT false"}, guards.paused_begins
    ),
    "sending hours at begin": Guard(
        BEGIN, {"SELECT EXISTS (SELECT FROM sending_hours)": "SELECT false"}, guards.begins_outside_hours
    ),
    "not early at begin": Guard(
        BEGIN, {"f.due_date) > now() +": "f.due_date) > 'infinity'::timestamptz +"}, guards.rescheduled_begins
    ),
    "token at settle": Guard(SETTLE, {TOKEN: ""}, guards.stale_result_settles),
    "pending and begun at settle": Guard(
        SETTLE, {"AND f.finished_at IS NULL": "", "AND f.begun_at IS NOT NULL": ""}, guards.result_settles_again
    ),
    "cancel requested at settle": Guard(
        SETTLE,
        {"(r.cancel_takes_precedence AND f.cancel_requested IS NOT NULL)": "false"},
        guards.reply_in_flight_is_forgotten,
    ),
    "lease at claim": Guard(
        CLAIM, {"f.lease_until IS NULL OR f.lease_until <= now()": "true"}, guards.leased_is_claimed
    ),
    "token at claim": Guard(CLAIM, {NEXT_TOKEN: "f.lease_token"}, guards.token_stays),
    "clock in a token": Guard(CLAIM, {NEXT_TOKEN: "f.lease_token + 1"}, guards.token_repeats),
    "grace at claim": Guard(
        CLAIM, {"AND (f.begun_at IS NULL OR NOT CAST(%(in_grace)s AS boolean))": ""}, guards.taken_from_its_worker
    ),
    "grace at a fair claim": Guard(
        FAIRLY,
        {"AND (f.begun_at IS NULL OR NOT CAST(%(in_grace)s AS boolean))": ""},
        guards.fairly(guards.taken_from_its_worker),
    ),
    "lock of the tick": Guard("dispatcher_state", {"FOR NO KEY UPDATE SKIP LOCKED": ""}, guards.claimed_beside_another),
    "pending at claim": Guard(CLAIM, {"f.status = 'pending'": "true"}, guards.ended_is_claimed),
    "lock at claim": Guard(CLAIM, NO_LOCK, guards.claimed_at_once),
    "lease at a fair claim": Guard(
        FAIRLY, {"f.lease_until IS NULL OR f.lease_until <= now()": "true"}, guards.fairly(guards.leased_is_claimed)
    ),
    "token at a fair claim": Guard(FAIRLY, {NEXT_TOKEN: "f.lease_token"}, guards.fairly(guards.token_stays)),
    "pending at a fair claim": Guard(FAIRLY, {"f.status = 'pending'": "true"}, guards.fairly(guards.ended_is_claimed)),
    "lock at a fair claim": Guard(FAIRLY, NO_LOCK, guards.fairly(guards.claimed_at_once)),
    "window at a fair claim": Guard(
        FAIRLY, {"(SELECT leased FROM looked)": "0"}, guards.fairly(guards.window_overflows)
    ),
    "shares": Guard(
        FAIRLY, {"ORDER BY leased + number, one.due": "ORDER BY one.due"}, guards.fairly(guards.one_takes_all)
    ),
    "token at release": Guard("SET lease_until = NULL FROM leased", {TOKEN: ""}, guards.stale_release),
    "token at end": Guard("leased.status", {TOKEN: ""}, guards.stale_end),
    # Three guards prevent the cancellation of a follow-up in flight: the locking query, the UPDATE and a table
    # constraint.
    "begun at cancel": Guard(
        "follow_ups",
        {BEGUN_ORM: "", "lease_until = NULL": "begun_at = NULL, lease_until = NULL"},
        guards.cancelled_in_flight,
    ),
    "workspace": Guard(
        "FROM follow_ups",
        {"AND follow_ups.workspace_id = ": "AND follow_ups.workspace_id <> "},
        guards.another_workspaces,
    ),
    "unblock at the end": Guard(
        "SET waits_for = NULL", {"f.waits_for = ANY": "false AND f.waits_for = ANY"}, guards.none_is_unblocked
    ),
    "token at defer": Guard(DEFER, {TOKEN: ""}, guards.stale_defer),
    "lease at defer": Guard(DEFER, {"AND f.lease_until > now()": ""}, guards.ended_lease_deferred),
    "pending and lease at defer": Guard(
        DEFER, {"f.finished_at IS NULL AND": "", "AND f.lease_until > now()": ""}, guards.cancelled_deferred
    ),
    "begun at defer": Guard(
        DEFER,
        {"AND f.begun_at IS NULL": "", "lease_until = NULL": "lease_until = NULL, begun_at = NULL"},
        guards.deferred_in_flight,
    ),
    "token at park": Guard("SET waits_for = leased.earlier", {TOKEN: ""}, guards.stale_park),
    "lock of the earlier at park": Guard("FOR SHARE", {"FOR SHARE SKIP LOCKED": ""}, guards.parked_behind_an_end),
    "look for the forgotten": Guard("NOT EXISTS (", {"IS NOT NULL AND NOT": "IS NULL AND NOT"}, guards.forgotten),
    "lock of a key": Guard(
        "pg_try_advisory", {"pg_try_advisory": "true OR pg_try_advisory"}, guards.created_twice_by_a_key
    ),
    "lock of the chat": Guard("FROM chats", {"FOR NO KEY UPDATE": ""}, guards.created_behind_a_reply),
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_with_the_guard(name: str, world: World, settings: Settings) -> None:
    """Each scenario keeps all promises if the scenario's guard is in place."""
    CATALOGUE[name].scenario(Scene(world, settings))


@pytest.mark.parametrize("name", CATALOGUE)
def test_without_the_guard(name: str, world: World, settings: Settings) -> None:
    """Each scenario breaks a promise if the scenario's guard is removed."""
    guard = CATALOGUE[name]
    with pytest.raises(PromiseBroken), without(world.engine, guard.within, guard.cuts):
        guard.scenario(Scene(world, settings))


@pytest.mark.parametrize(
    ("constraint", "change"),
    [
        # simulates saving a stale copy of the row with all its columns
        ("final_has_finished_at", "status = 'pending'"),
        ("reason_explains", "status = 'failed'"),
        ("waiting_is_pending", "waits_for = id"),
        ("begun_holds_lease", "begun_at = now()"),
        ("status_is_known", "status = 'gone'"),
    ],
)
def test_constraint(constraint: str, change: str, world: World) -> None:
    """Each table constraint refuses an invalid row, which PostgreSQL would otherwise store."""
    follow_up = world.follow_up(status="sent", finished_at=text("now()"))
    statement = f"UPDATE follow_ups SET {change} WHERE id = :id"  # noqa: S608 - no input, only the cases above
    with pytest.raises(IntegrityError, match=constraint):
        world.sql(statement, id=follow_up)
    world.alter(f"ALTER TABLE follow_ups DROP CONSTRAINT ck_follow_ups_{constraint}")
    world.sql(statement, id=follow_up)


class RecordingTransport:
    """A transport that records when it was called."""

    name = "telling"

    def __init__(self, clock: DatabaseClock) -> None:
        """Store the ``clock`` that gives the time of each call."""
        self._clock = clock
        self.called: list[datetime] = []

    async def open(self) -> None:
        """Do nothing; this transport has no connections to open."""

    async def close(self) -> None:
        """Do nothing; this transport has no connections to close."""

    async def send(self, _delivery: Delivery) -> Sent:
        """Record the moment at which the transport is called."""
        self.called.append(self._clock.now())
        return Sent(None)


class EverythingDueClock(DatabaseClock):
    """A database clock that reports every follow-up as due."""

    def until(self, _moment: datetime) -> float:
        """Return 0, as if the follow-up were already due."""
        return 0.0


def begun_of(lease: Lease) -> Begun:
    """Return an attempt that has begun under the given lease."""
    delivery = Delivery(lease.id, uuid4(), uuid4(), "api", None, uuid4(), "Still there?", lease.due, 1)
    return Begun(lease, delivery, 0)


async def sent_by(clock: DatabaseClock, engine: Engine, begun: Begun, latest: float) -> list[timedelta]:
    """Send a follow-up using the given clock, and return how late the transport was called.

    Lateness is measured from the due date, using the database's clock.
    """
    clock.ask(engine)
    transport = RecordingTransport(clock)
    await send(transport, begun, clock, CallTimeout(timedelta(seconds=5)), latest, NO_BREAKER)
    return [moment - begun.lease.due for moment in transport.called]


async def test_never_early(world: World, engine: Engine, settings: Settings) -> None:
    """If the sender did not wait for the due date, it would call the transport too early."""
    ahead = timedelta(seconds=2)
    world.follow_up(due=ahead)
    begun = begun_of(Scene(world, settings.model_copy(update={"tick_interval": ahead})).lease())
    (early,) = await sent_by(EverythingDueClock(), engine, begun, inf)
    (waited,) = await sent_by(DatabaseClock(), engine, begun, inf)
    assert early < timedelta(0) <= waited


async def test_never_after_the_lease(world: World, engine: Engine, settings: Settings) -> None:
    """If a sender wakes after its lease has expired, only the guard under test keeps it from sending."""
    world.follow_up()
    begun = begun_of(Scene(world, settings).lease())
    assert await sent_by(DatabaseClock(), engine, begun, uptime() - 1) == []
    assert len(await sent_by(DatabaseClock(), engine, begun, inf)) == 1

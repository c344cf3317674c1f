"""Tests of rows that other programs made unreadable or unwritable: all other rows are processed."""

from __future__ import annotations

import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

import followups
from followups.delivery import begin as begin_module
from followups.delivery.attempts import Attempt
from followups.delivery.begin import REFUSED_PAUSE, begin
from followups.delivery.claim import claim, claim_fairly
from followups.delivery.dispatcher import Dispatcher
from followups.delivery.hints import leases_of
from followups.delivery.settle import settle
from followups.flow_control.limiter import release_deferred
from followups.states import Status, finish
from followups.store import bulk_cancel, chat_order, chats, pauses, rate_limits
from followups.store.chats import Role
from followups.transports.port import Retry, Sent
from stack import wait_until
from world import begun, claim_and_begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.delivery.attempts import Begun
    from followups.delivery.hints import Hint
    from followups.settings import Settings
    from followups.store.claims import Claim
    from followups.transports.port import Outcome
    from world import World

SECOND = timedelta(seconds=1)


def test_begun_attempts_are_returned(
    world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a rejected row cannot be deferred, begin still returns the batch's other attempts."""
    world.follow_up(attempts=2**31 - 1)
    others = {type(world)(engine).follow_up() for _ in range(9)}

    def fail(*_: object) -> None:
        raise PoolTimeoutError

    monkeypatch.setattr(begin_module.leases, "defer_if_not_begun", fail)
    assert begun(begin(engine, settings, claim(engine, settings).leases)) == others


def unchecked(world: World, table: str) -> None:
    """Drop the constraint on times, because older rows may violate it."""
    world.alter(f"ALTER TABLE {table} DROP CONSTRAINT ck_{table}_times_are_readable")


def attempt(begun_one: Begun, outcome: Outcome) -> Attempt:
    """Return an attempt that has just ended."""
    now = time.monotonic()
    return Attempt(begun_one, outcome, 0.005, now, 0.0)


def hours_of_24(world: World) -> None:
    """Insert sending hours that Python cannot read and that are closed now."""
    unchecked(world, "sending_hours")
    world.sql(
        "INSERT INTO sending_hours (workspace_id, time_zone, opening, closing, days, open_from, open_until)"
        " VALUES (:id, 'UTC', '00:00', '24:00', 127, now() + interval '1 h', now() + interval '2 h')",
        id=world.workspace_id,
    )


def endless_window(world: World) -> None:
    """Set sending hours that exclude now, and date each chat's last user message at infinity."""
    unchecked(world, "chats")
    world.sql(
        "UPDATE chats SET channel = 'whatsapp', last_user_message_at = 'infinity' WHERE workspace_id = :id",
        id=world.workspace_id,
    )
    world.sql(
        "INSERT INTO sending_hours (workspace_id, time_zone, opening, closing, days, open_from, open_until)"
        " VALUES (:id, 'UTC', '00:00', '00:00', 127, now() + interval '1 h', now() + interval '2 h')",
        id=world.workspace_id,
    )


def as_many_attempts_as_there_can_be(world: World) -> None:
    """Set the number of attempts to the largest value that its column can store."""
    world.sql("UPDATE follow_ups SET attempts = 2147483647 WHERE workspace_id = :id", id=world.workspace_id)


def refused_by_a_trigger(world: World) -> None:
    """Create a trigger that makes begin fail, as another program's trigger might."""
    world.alter(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NEW.workspace_id = '{world.workspace_id}' AND NEW.begun_at IS NOT NULL THEN RAISE 'not this one'; END IF;"
        " RETURN NEW; END $$"
    )
    world.alter("CREATE TRIGGER refuse BEFORE UPDATE ON follow_ups FOR EACH ROW EXECUTE FUNCTION refuse()")


@pytest.mark.parametrize("spoil", [hours_of_24, endless_window, as_many_attempts_as_there_can_be, refused_by_a_trigger])
def test_a_follow_up_that_cannot_begin(
    world: World, engine: Engine, settings: Settings, spoil: Callable[[World], None]
) -> None:
    """A follow-up that cannot begin stays pending, and is logged and deferred for a minute.

    Other follow-ups begin.
    """
    others = type(world)(engine)
    bad, good = world.follow_up(), {others.follow_up() for _ in range(9)}
    spoil(world)
    with capture_logs() as logs:
        beginning = claim_and_begin(engine, settings)
    assert begun(beginning) == good
    assert beginning.retry_later == ()
    assert [(line["step"], line["follow_up_id"]) for line in logs if line["event"] == "row_refused"] == [
        ("begin", str(bad))
    ]
    row = world.row(bad)
    assert (row.status, row.lease_until, row.begun_at) == ("pending", None, None)
    assert timedelta(0) < row.next_attempt_at - world.scalar("SELECT now()") <= REFUSED_PAUSE


def test_a_row_that_cannot_be_deferred(world: World, engine: Engine, settings: Settings) -> None:
    """A follow-up that cannot be written is claimed again after its lease; other follow-ups begin."""
    bad, good = world.follow_up(), world.follow_up()
    leases = claim(engine, settings).leases
    world.alter(f"ALTER TABLE follow_ups ADD CHECK (id <> '{bad}') NOT VALID")
    with capture_logs() as logs:
        assert begun(begin(engine, settings, leases)) == {good}
    assert [line["step"] for line in logs if line["event"] == "row_refused"] == ["begin", "defer"]
    assert world.row(bad).lease_until is not None


def unwritable(world: World, follow_up_id: UUID) -> None:
    """Add a constraint that rejects every write of the row."""
    world.alter(f"ALTER TABLE follow_ups ADD CHECK (id <> '{follow_up_id}') NOT VALID")


def lost_twice(world: World, chat: UUID | None = None) -> UUID:
    """Insert a follow-up in flight whose third lease has just expired."""
    return world.follow_up(
        chat,
        -2 * SECOND,
        begun_at=text("now() - interval '1 min'"),
        lease_until=text("now() - interval '1 s'"),
        losses=2,
    )


def blocked_for_nothing(world: World) -> UUID:
    """Insert a follow-up that still waits for another one, although the other one has ended."""
    chat = world.chat()
    first = world.follow_up(chat, -2 * SECOND)
    second = world.follow_up(chat, -SECOND, waits_for=first)
    world.sql("UPDATE follow_ups SET status = 'failed', reason = 'x', finished_at = now() WHERE id = :id", id=first)
    return second


def paused_by_nothing(world: World) -> UUID:
    """Insert a follow-up held by a pause that has ended."""
    return world.follow_up(due=-SECOND, pause_id=uuid4(), next_attempt_at=text("timestamptz '9998-12-31'"))


def behind_a_third_loss(world: World) -> UUID:
    """Insert a follow-up whose predecessor in the chat has lost its third lease."""
    chat = world.chat()
    return world.follow_up(chat, -SECOND, waits_for=lost_twice(world, chat))


@contextmanager
def ticking(settings: Settings, engine: Engine) -> Iterator[Callable[[], set[UUID]]]:
    """Run a dispatcher; yield a function that requests a tick and returns all leases claimed so far."""
    hints: list[Hint] = []
    dispatcher = Dispatcher(settings, engine, hints.append)
    dispatcher.start()

    def claimed() -> set[UUID]:
        dispatcher.tick()
        return {lease.id for hint in hints for lease in leases_of(*hint)}

    try:
        yield claimed
    finally:
        dispatcher.stop()


@pytest.mark.parametrize("insert", [blocked_for_nothing, paused_by_nothing, behind_a_third_loss])
def test_a_row_that_cannot_be_released(
    world: World, engine: Engine, settings: Settings, insert: Callable[[World], UUID]
) -> None:
    """If a blocked or paused follow-up cannot be released, it is logged.

    All other blocked or paused follow-ups are released and claimed.
    """
    others = type(world)(engine)
    bad = insert(world)
    good = {insert(others) for _ in range(3)} | {others.follow_up(due=-SECOND)}
    unwritable(world, bad)
    with capture_logs() as logs, ticking(settings, engine) as claimed:
        wait_until(lambda: good <= claimed())
        wait_until(lambda: claimed() and any(line["event"] == "row_refused" for line in logs))
    refused = {(line["step"], line["follow_up_id"]) for line in logs if line["event"] == "row_refused"}
    assert refused == {("unblock", str(bad))}
    assert world.row(bad).lease_until is None


@pytest.mark.parametrize(("insert", "store"), [(blocked_for_nothing, chat_order), (paused_by_nothing, pauses)])
def test_more_unwritable_rows_than_one_search(
    world: World,
    engine: Engine,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    insert: Callable[[World], UUID],
    store: ModuleType,
) -> None:
    """Every follow-up that can be released is found, even among many that stay blocked or paused."""
    monkeypatch.setattr(store, "BATCH", 2)
    for _ in range(5):
        insert(world)
    world.sql("UPDATE follow_ups SET attempts = 99")
    world.alter("ALTER TABLE follow_ups ADD CHECK (attempts <> 99) NOT VALID")
    others = type(world)(engine)
    good = {insert(others) for _ in range(5)}
    with ticking(settings, engine) as claimed:
        wait_until(lambda: good <= claimed())


def test_a_lease_that_cannot_be_released(world: World, engine: Engine, settings: Settings) -> None:
    """If hints cannot be published and one lease cannot be released, the other leases are released.

    The released follow-ups can be claimed again at once.
    """
    bad, good = world.follow_up(due=-SECOND), world.follow_up()
    world.alter(f"ALTER TABLE follow_ups ADD CHECK (id <> '{bad}' OR lease_until IS NOT NULL) NOT VALID")
    world.sql("UPDATE follow_ups SET lease_until = now() - interval '1 s'")
    published: list[Hint] = []

    def publish(hint: Hint) -> None:
        published.append(hint)
        message = "no broker"
        raise ConnectionError(message)

    dispatcher = Dispatcher(settings.model_copy(update={"lease": timedelta(minutes=5)}), engine, publish)
    dispatcher.start()
    dispatcher.tick()
    wait_until(lambda: published)
    dispatcher.stop()
    assert [world.row(one).lease_until is None for one in (bad, good)] == [False, True]


def test_a_row_that_cannot_be_cancelled(world: World, engine: Engine) -> None:
    """A bulk cancellation skips a row that cannot be written, and cancels all other follow-ups."""
    bad, good = world.follow_up(), {world.follow_up() for _ in range(5)}
    unwritable(world, bad)
    with engine.begin() as connection:
        pending = bulk_cancel.CancelScope(world.workspace_id, None, bulk_cancel.now(connection))
        final = finish(Status.CANCELLED, words="over")
        batch = bulk_cancel.cancel_if_not_begun(connection, pending, final, bulk_cancel.CancelCursor())
    assert set(batch.cancelled) == good
    assert batch.ended is not None


@pytest.mark.parametrize("scope", ["limit", "breaker"])
def test_a_row_that_stays_deferred(
    world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    """If deferred follow-ups are released, a follow-up with an unwritable row stays deferred.

    All other deferred follow-ups become due.
    """
    monkeypatch.setattr(rate_limits, "BATCH", 2)
    ids = world.burst([-SECOND] * 9)
    leases = claim(engine, settings).leases
    with engine.begin() as connection:
        rate_limits.defer_if_leased(connection, [(lease, timedelta(minutes=1)) for lease in leases])
    bad, good = leases[:3], leases[3:]
    for lease in bad:
        unwritable(world, lease.id)
    if scope == "limit":
        release_deferred(engine, (world.workspace_id, None))
    else:
        with engine.begin() as connection:
            rate_limits.release_workspaces(connection, [world.workspace_id], timedelta(minutes=5), len(ids))
    assert {one for one in ids if world.row(one).next_attempt_at is None} == {lease.id for lease in good}


def test_a_row_that_cannot_end(world: World, engine: Engine, settings: Settings) -> None:
    """After three lost leases, a follow-up is not sent again, even if its row cannot be written.

    Other follow-ups are claimed as usual.
    """
    others = type(world)(engine)
    bad, good = lost_twice(world), {others.follow_up() for _ in range(3)}
    world.alter(f"ALTER TABLE follow_ups ADD CHECK (id <> '{bad}' OR status = 'pending') NOT VALID")
    with ticking(settings, engine) as claimed:
        wait_until(lambda: good <= claimed())
        assert bad not in claimed()
    assert (world.row(bad).losses, world.row(bad).begun_at is None) == (2, False)


def test_more_unwritable_rows_than_one_claim(world: World, engine: Engine, settings: Settings) -> None:
    """Claims continue even if the number of unwritable rows exceeds MAX_IN_FLIGHT."""
    others = type(world)(engine)
    world.burst([-10 * SECOND] * 30)
    world.sql("UPDATE follow_ups SET attempts = 99")
    world.alter("ALTER TABLE follow_ups ADD CHECK (attempts <> 99) NOT VALID")
    good = {others.follow_up(due=-SECOND) for _ in range(5)}
    with ticking(settings.model_copy(update={"max_in_flight": 10}), engine) as claimed:
        wait_until(lambda: good <= claimed())


def test_fair_claim_skips_an_unwritable_row(world: World, engine: Engine, settings: Settings) -> None:
    """A fair claim skips an unwritable row, even one that an ordered claim would not reach."""
    others = type(world)(engine)
    world.burst([-10 * SECOND] * 25)
    with ticking(settings.model_copy(update={"max_in_flight": 10, "lease": timedelta(minutes=5)}), engine) as claimed:
        wait_until(lambda: len(claimed()) == 10)
        unwritable(world, others.follow_up(due=-SECOND))
        world.sql(
            "UPDATE follow_ups SET status = 'sent', finished_at = now(), lease_until = NULL WHERE lease_until > now()"
        )
        wait_until(lambda: len(claimed()) == 20)


def test_the_chats_next_follow_up_cannot_be_written(world: World, engine: Engine, settings: Settings) -> None:
    """If a chat's next follow-up cannot be unblocked, the accepted follow-up is still settled.

    In all other chats, the next follow-up is unblocked.
    """
    pairs = []
    for _ in range(4):
        chat = world.chat()
        first = world.follow_up(chat, -2 * SECOND)
        pairs.append((first, world.follow_up(chat, -SECOND, waits_for=first)))
    attempts = [attempt(one, Sent()) for one in claim_and_begin(engine, settings).begun]
    unwritable(world, pairs[0][1])
    settling = settle(engine, settings, attempts)
    assert {one.id for one in settling.settled} == {first for first, _ in pairs}
    assert {row.status for row in world.rows(*(first for first, _ in pairs))} == {"sent"}
    assert {lease.id for lease in settling.unblocked} == {second for _, second in pairs[1:]}


def test_the_chats_next_follow_up_when_begin_ends_the_first(world: World, engine: Engine, settings: Settings) -> None:
    """If begin ends a follow-up, it stays ended even if the chat's next one cannot be unblocked."""
    chat = world.chat(removed_at=text("now()"))
    first = world.follow_up(chat, -2 * SECOND)
    unwritable(world, world.follow_up(chat, -SECOND, waits_for=first))
    assert [one for one, _ in claim_and_begin(engine, settings).ended] == [first]


def test_a_later_row_of_the_chat_cannot_be_written(world: World, engine: Engine, settings: Settings) -> None:
    """A chat's second follow-up waits for the first, even if the third row cannot be written."""
    chat = world.chat()
    first = world.follow_up(chat, -3 * SECOND, next_attempt_at=text("now() + interval '1 h'"))
    second = world.follow_up(chat, -2 * SECOND)
    unwritable(world, world.follow_up(chat, -SECOND, next_attempt_at=text("now() + interval '1 h'")))
    claim_and_begin(engine, settings)
    assert world.row(second).waits_for == first


def test_a_reply(world: World, engine: Engine, settings: Settings) -> None:
    """A reply cancels the chat's follow-ups, except a follow-up whose row cannot be written."""
    chat = world.chat()
    good = world.follow_up(chat, -SECOND)
    unwritable(world, world.follow_up(chat, timedelta(hours=1)))
    with Session(engine) as session, session.begin():
        received = chats.receive(
            session, world.workspace_id, message_id=uuid4(), chat_id=chat, role=Role.USER, created_at=None
        )
    assert received.cancelled == (good,)
    assert claim_and_begin(engine, settings).begun == ()


def test_a_cancel(world: World, engine: Engine) -> None:
    """A follow-up is cancelled even if the next follow-up in its chat cannot be unblocked."""
    chat = world.chat()
    first = world.follow_up(chat)
    unwritable(world, world.follow_up(chat, waits_for=first))
    with Session(engine) as session, session.begin():
        followups.cancel(session, first)
    assert world.row(first).status == "cancelled"


@pytest.mark.parametrize("window", [100, 6])
def test_a_row_that_cannot_be_claimed(world: World, engine: Engine, settings: Settings, window: int) -> None:
    """Claims skip a row that cannot be written; the row stays pending and is logged."""
    others = type(world)(engine)
    bad, good = world.follow_up(due=-SECOND), {others.follow_up() for _ in range(5)}
    more = {world.follow_up() for _ in range(9)} if window < 10 else set()
    world.alter(f"ALTER TABLE follow_ups ADD CHECK (id <> '{bad}') NOT VALID")
    hints: list[Hint] = []
    with capture_logs() as logs:
        ticking = Dispatcher(settings.model_copy(update={"max_in_flight": window}), engine, hints.append)
        ticking.start()

        def claimed() -> bool:
            ticking.tick()
            return len({lease.id for hint in hints for lease in leases_of(*hint)}) >= min(window, len(good | more))

        wait_until(claimed)
        ticking.stop()
    taken = {lease.id for hint in hints for lease in leases_of(*hint)}
    assert taken <= good | more
    refused = [line for line in logs if line["event"] == "row_refused"]
    assert {(line["step"], line["follow_up_id"]) for line in refused} == {("claim", str(bad))}
    assert world.row(bad).status == "pending"


@pytest.mark.parametrize("take", [claim, claim_fairly])
@pytest.mark.parametrize("moment", ["-infinity", "0044-03-15 BC", "0001-01-01"])
def test_a_time_before_the_calendar(
    world: World, engine: Engine, settings: Settings, moment: str, take: Callable[..., Claim]
) -> None:
    """If the next attempt is dated before year 1, the follow-up counts as due and begins."""
    unchecked(world, "follow_ups")
    ids = {world.follow_up(next_attempt_at=text(f"timestamptz '{moment}'")), world.follow_up()}
    assert begun(begin(engine, settings, take(engine, settings).leases)) == ids


def test_the_chats_next_follow_up_before_the_calendar(world: World, engine: Engine, settings: Settings) -> None:
    """After its predecessor is settled, a follow-up due at minus infinity is sent."""
    unchecked(world, "follow_ups")
    chat = world.chat()
    world.follow_up(chat, -2 * SECOND)
    second = world.follow_up(chat, -SECOND)
    (one,) = claim_and_begin(engine, settings).begun
    world.sql("UPDATE follow_ups SET next_attempt_at = '-infinity' WHERE id = :id", id=second)
    settling = settle(engine, settings, [attempt(one, Sent())])
    assert begun(begin(engine, settings, settling.unblocked)) == {second}


def test_begun_manually(world: World, engine: Engine, settings: Settings) -> None:
    """Even with an attempt count of 0, a begun follow-up can be claimed after its lease expires."""
    lost = world.follow_up(begun_at=text("now()"), lease_until=text("now() - interval '1 s'"), attempts=0)
    claimed = claim(engine, settings)
    assert ([lease.id for lease in claimed.leases], world.row(lost).attempts) == ([lost], 0)


class TestRecords:
    """Tests in which new failed attempts would get ids already in use, as after logical replication."""

    @pytest.fixture(autouse=True)
    def _behind(self, world: World) -> None:
        """Restart the id sequence of `failed_attempts`, so that its next ids are already in use."""
        one = world.follow_up(due=timedelta(days=1))
        for number in range(9):
            world.sql(
                "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail) VALUES (:id, :n, 'retry', '')",
                id=one,
                n=number,
            )
        world.alter("ALTER SEQUENCE failed_attempts_id_seq RESTART")

    def test_a_settlement(self, world: World, engine: Engine, settings: Settings) -> None:
        """If a failed attempt cannot be recorded, it is logged and all results are still settled.

        A failed attempt that cannot be recorded does not keep others from being recorded.
        """
        ids = [world.follow_up() for _ in range(4)]
        attempts = [attempt(one, Retry("busy")) for one in claim_and_begin(engine, settings).begun]
        with capture_logs() as logs:
            settled = settle(engine, settings, attempts).settled
        assert {one.id for one in settled} == set(ids)
        refused = {line["follow_up_id"] for line in logs if line["event"] == "row_refused"}
        recorded = {str(one) for one in ids if world.failures(one)}
        assert refused | recorded == {str(one) for one in ids}
        assert refused

    def test_a_claim(self, world: World, engine: Engine, settings: Settings) -> None:
        """A follow-up whose lease was lost is claimed again even if the failed attempt cannot be recorded."""
        lost = world.follow_up(begun_at=text("now()"), lease_until=text("now() - interval '1 s'"))
        with capture_logs() as logs:
            assert [lease.id for lease in claim(engine, settings).leases] == [lost]
        assert [line["step"] for line in logs if line["event"] == "row_refused"] == ["record"]

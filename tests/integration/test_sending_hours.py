"""Tests of sending hours on PostgreSQL, alone and together with messaging windows."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, ClassVar
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

import followups
from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.delivery.hold import hold
from followups.errors import InvalidRequestError, OutsideMessagingWindowError
from followups.scheduling import amend
from followups.sending_hours import EVERY_DAY, SendingHours, opens_at
from followups.store import chat_order, holds, leases, obstacles, sending_hours
from followups.store.holds import SPREAD
from followups.store.settlement import ENDED_MARGIN
from world import begun, claim_and_begin

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from followups.settings import Settings
    from world import World

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)


def hours_from(ahead: timedelta, length: timedelta) -> SendingHours:
    """Return daily sending hours in UTC, given the time from now to their start, and their length.

    The start and the end are rounded down to the minute.
    """
    opening = datetime.now(UTC) + ahead
    return SendingHours("UTC", clock(opening), clock(opening + length))


def clock(moment: datetime) -> time:
    """Return the local time of day, without seconds."""
    return moment.time().replace(second=0, microsecond=0)


CLOSED = hours_from(3 * HOUR, HOUR)
OPEN = hours_from(-HOUR, 3 * HOUR)


def put(world: World, hours: SendingHours) -> None:
    """Set the workspace's sending hours."""
    with Session(world.engine) as session, session.begin():
        sending_hours.put(session, world.workspace_id, hours)


def replace_hours(world: World, hours: SendingHours | None) -> None:
    """Set or clear the sending hours, with the same effect as on the command line.

    Held follow-ups are released, so that their sending hours are checked again.
    """
    with Session(world.engine) as session, session.begin():
        if hours:
            sending_hours.put(session, world.workspace_id, hours)
        else:
            sending_hours.clear(session, world.workspace_id)
    with world.engine.begin() as connection:
        holds.release_held(connection, world.workspace_id)


def opening_of(world: World, hours: SendingHours) -> datetime:
    """Return the time at which the sending hours begin next."""
    return opens_at(hours, world.scalar("SELECT now()"))


def test_held_until_sending_hours_begin(world: World, engine: Engine, settings: Settings) -> None:
    """Outside a workspace's sending hours, no follow-up begins and no attempt is used up."""
    others = type(world)(engine)
    put(world, CLOSED)
    mine, theirs = world.follow_up(), others.follow_up()
    assert begun(claim_and_begin(engine, settings)) == {theirs}
    row, opening = world.row(mine), opening_of(world, CLOSED)
    assert (row.status, row.attempts, row.snoozes, row.lease_until) == ("pending", 0, 0, None)
    assert row.held_until == opening
    assert opening <= row.next_attempt_at <= opening + SPREAD
    assert claim(engine, settings).leases == ()


def test_sent_within_the_hours(world: World, engine: Engine, settings: Settings) -> None:
    """During sending hours, a follow-up begins normally."""
    put(world, OPEN)
    follow_up = world.follow_up()
    assert begun(claim_and_begin(engine, settings)) == {follow_up}


def test_begins_after_the_opening(world: World, engine: Engine, settings: Settings) -> None:
    """Held follow-ups begin as soon as the sending hours have begun."""
    put(world, CLOSED)
    follow_up = world.follow_up()
    claim_and_begin(engine, settings)
    # Simulate that an hour has passed: shift the times that the database compares.
    world.sql("UPDATE sending_hours SET open_from = now() - interval '1 min'")
    world.sql("UPDATE follow_ups SET next_attempt_at = now(), held_until = now() - interval '1 min'")
    assert begun(claim_and_begin(engine, settings)) == {follow_up}


def test_the_next_sending_period_is_stored(world: World, engine: Engine, settings: Settings) -> None:
    """When a sending period ends, the first worker that notices the end stores the next period."""
    put(world, OPEN)
    world.sql("UPDATE sending_hours SET open_from = now() - interval '2 day', open_until = now() - interval '1 day'")
    follow_up = world.follow_up()
    beginning = claim_and_begin(engine, settings)
    assert [lease.id for lease in beginning.retry_later] == [follow_up]
    assert world.scalar("SELECT open_from <= now() AND now() < open_until FROM sending_hours")
    assert begun(begin(engine, settings, beginning.retry_later)) == {follow_up}


def test_begun_just_before_the_opening(world: World, engine: Engine, settings: Settings) -> None:
    """A follow-up may begin slightly before its due date, and slightly before sending hours open."""
    put(world, OPEN)
    world.sql("UPDATE sending_hours SET open_from = now() + interval '80 ms'")
    follow_up = world.follow_up(due=timedelta(milliseconds=90))
    assert begun(claim_and_begin(engine, settings)) == {follow_up}


def test_the_first_due_comes_back_first(world: World) -> None:
    """When sending hours open, held follow-ups become due within a second, in order of due date."""
    opening = world.scalar("SELECT now()")
    back = [holds.back_at(opening, opening - ago) for ago in (50 * HOUR, 9 * HOUR, 8 * HOUR, MINUTE)]
    assert back == sorted(back)
    assert len(set(back)) == 4
    assert all(opening <= one <= opening + SPREAD for one in back)


def test_order_within_the_chat_is_kept(world: World, engine: Engine, settings: Settings) -> None:
    """If two follow-ups of a chat are held until the same opening time, they begin in order."""
    put(world, CLOSED)
    chat = world.chat()
    first, second = world.follow_ups_at_once([(chat, -2 * SECOND), (chat, -SECOND)])
    claim_and_begin(engine, settings)
    assert world.row(first).held_until == world.row(second).held_until
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM sending_hours"))
        assert holds.release_held(connection, world.workspace_id) == 2
    assert begun(claim_and_begin(engine, settings)) == {first}
    assert world.row(second).waits_for == first
    with engine.begin() as connection:
        assert chat_order.unblock_orphaned(connection) == 0


def test_changed_during_the_hold(world: World, engine: Engine, settings: Settings) -> None:
    """A change that clears sending hours waits for a concurrent hold and then releases the follow-up."""
    put(world, CLOSED)
    follow_up = world.follow_up()
    (lease,) = claim(engine, settings).leases
    freed: list[int] = []

    def clear() -> None:
        with Session(engine) as session, session.begin():
            sending_hours.clear(session, world.workspace_id)
        with engine.begin() as connection:
            freed.append(holds.release_held(connection, world.workspace_id))

    with engine.connect() as holding:
        found = obstacles.find(holding, [lease], leases.Rules(settings.lease, settings.max_lateness, SECOND))
        assert hold(holding, settings, found)[0] == {follow_up}
        clearing = threading.Thread(target=clear)
        clearing.start()
        clearing.join(0.3)
        assert clearing.is_alive()
        holding.commit()
        clearing.join(10)
    assert freed == [1]
    assert begun(claim_and_begin(engine, settings)) == {follow_up}


def test_changed_before_the_hold(world: World, engine: Engine, settings: Settings) -> None:
    """If the sending hours change just before a follow-up would be held, it is not held."""
    put(world, CLOSED)
    world.follow_up()
    (lease,) = claim(engine, settings).leases
    opening = opening_of(world, CLOSED)
    put(world, OPEN)
    with engine.begin() as connection:
        assert holds.hold_if_leased(connection, [holds.Hold(lease, opening, opening, hours=CLOSED)]) == set()


class TestLateness:
    """Lateness counts from the first moment at which sending hours allow the follow-up."""

    OLD: ClassVar = {"due": -5 * HOUR, "scheduled_at": text("now() - interval '5 h'")}

    def test_held_time_is_not_lateness(self, world: World, engine: Engine, settings: Settings) -> None:
        """Even a follow-up held for longer than MAX_LATENESS is sent when the sending hours begin.

        Only the delay after the hold counts as lateness.
        """
        brief = settings.model_copy(update={"max_lateness": HOUR})
        put(world, OPEN)
        old = {"due": -5 * HOUR, "scheduled_at": text("now() - interval '5 h'")}
        kept = world.follow_up(**old, held_until=text("now() - interval '59 min'"))
        late = world.follow_up(**old, held_until=text("now() - interval '61 min'"))
        beginning = claim_and_begin(engine, brief)
        assert begun(beginning) == {kept}
        assert [(one, final.reason) for one, final in beginning.ended] == [(late, "too_late")]

    def test_due_outside_sending_hours_without_a_worker(self, world: World, engine: Engine, settings: Settings) -> None:
        """A follow-up due outside sending hours counts as held even without a running worker."""
        brief = settings.model_copy(update={"max_lateness": HOUR})
        put(world, hours_from(-30 * MINUTE, 3 * HOUR))
        old = {"scheduled_at": text("now() - interval '9 h'")}
        night = world.follow_up(due=-5 * HOUR, **old)
        yesterday = world.follow_up(due=-25 * HOUR, scheduled_at=text("now() - interval '26 h'"))
        beginning = claim_and_begin(engine, brief)
        assert [one for one, _ in beginning.ended] == [yesterday]
        assert begun(claim_and_begin(engine, brief)) == {night}

    def test_sending_hours_locked_during_a_hold(self, world: World, engine: Engine, settings: Settings) -> None:
        """If another transaction locks the sending hours, a late follow-up does not end and is checked again."""
        brief = settings.model_copy(update={"max_lateness": HOUR})
        put(world, hours_from(-30 * MINUTE, 3 * HOUR))
        night = world.follow_up(due=-5 * HOUR, scheduled_at=text("now() - interval '9 h'"))
        with engine.connect() as changing:
            changing.execute(text("SELECT FROM sending_hours FOR UPDATE"))
            beginning = claim_and_begin(engine, brief)
        assert (beginning.ended, [lease.id for lease in beginning.retry_later]) == ((), [night])
        assert world.row(night).status == "pending"

    @pytest.mark.parametrize("hours", [OPEN, None])
    def test_hours_that_are_widened_or_cleared(
        self, world: World, engine: Engine, settings: Settings, hours: SendingHours | None
    ) -> None:
        """If a change of sending hours releases held follow-ups, their lateness counts from the change."""
        brief = settings.model_copy(update={"max_lateness": HOUR})
        put(world, CLOSED)
        ids = {world.follow_up(**self.OLD), world.follow_up(**self.OLD)}
        claim_and_begin(engine, brief)
        before = world.scalar("SELECT now()")
        replace_hours(world, hours)
        rows = [world.row(one) for one in ids]
        assert all(before < row.sendable_from < world.scalar("SELECT now()") for row in rows)
        assert begun(claim_and_begin(engine, brief)) == ids

    def test_hours_that_are_moved(self, world: World, engine: Engine, settings: Settings) -> None:
        """If the sending hours change, a held follow-up waits until the new hours begin.

        Follow-ups that were already sendable keep the time at which they became sendable.
        """
        held, earlier = world.follow_up(**self.OLD), text("now() - interval '9 min'")
        put(world, CLOSED)
        claim_and_begin(engine, settings)
        snoozed = world.follow_up(**self.OLD, sendable_from=earlier, held_until=text("now() + interval '9 h'"))
        was = world.row(snoozed).sendable_from
        later = hours_from(5 * HOUR, HOUR)
        replace_hours(world, later)
        assert world.row(held).sendable_from == opening_of(world, later)
        claim_and_begin(engine, settings)
        for one in (held, snoozed):
            assert world.row(one).held_until == opening_of(world, later)
        assert world.row(held).sendable_from == opening_of(world, later)
        assert world.row(snoozed).sendable_from == was

    def test_held_repeatedly(self, world: World, engine: Engine, settings: Settings) -> None:
        """Lateness counts from the first time at which a follow-up could have been sent, even after holds.

        A hold ends when the allowed lateness ends, even if the sending hours begin later.
        """
        brief = settings.model_copy(update={"max_lateness": 3 * HOUR})
        put(world, hours_from(-2 * HOUR, HOUR))
        due = {"due": -90 * MINUTE, "scheduled_at": text("now() - interval '2 h'")}
        mine, often = world.follow_up(**due), world.follow_up(**due, sendable_from=text("now() - interval '95 min'"))
        was = {one: world.row(one) for one in (mine, often)}
        claim_and_begin(engine, brief)
        ends = [was[mine].due_date + 3 * HOUR, was[often].sendable_from + 3 * HOUR]
        assert [world.row(one).held_until for one in (mine, often)] == ends
        assert [world.row(one).next_attempt_at for one in (mine, often)] == [end + ENDED_MARGIN for end in ends]
        assert world.row(mine).sendable_from == was[mine].due_date
        assert world.row(often).sendable_from == was[often].sendable_from
        world.sql("UPDATE follow_ups SET next_attempt_at = now(), sendable_from = sendable_from - interval '2 h'")
        put(world, OPEN)
        assert {one for one, _ in claim_and_begin(engine, brief).ended} == {mine, often}

    def test_a_new_due_date(self, world: World, engine: Engine, settings: Settings) -> None:
        """A new due date resets a follow-up's lateness, but a move to another chat does not."""
        put(world, CLOSED)
        moved, elsewhere = world.follow_up(), world.follow_up()
        claim_and_begin(engine, settings)
        with Session(engine) as session, session.begin():
            amend(session, moved, {"due_date": datetime.now(UTC) + HOUR})
            amend(session, elsewhere, {"chat_id": world.chat()})
        assert world.row(moved).sendable_from is None
        assert world.row(elsewhere).sendable_from == opening_of(world, CLOSED)


class TestWindow:
    """Tests of chats that have both a messaging window and sending hours."""

    def windowed(self, world: World, left: timedelta) -> UUID:
        """Return a chat whose messaging window ends after the given duration."""
        ago = (24 * HOUR - left).total_seconds()
        return world.chat(channel="whatsapp", last_user_message_at=text(f"now() - interval '{ago} s'"))

    def test_a_hold_that_would_miss_the_window(self, world: World, engine: Engine, settings: Settings) -> None:
        """A follow-up that would be held beyond its messaging window fails immediately as window_closed.

        If a hold would end within the messaging window, the follow-up is held.
        """
        put(world, CLOSED)
        missed, fits = (world.follow_up(self.windowed(world, left)) for left in (2 * HOUR, 5 * HOUR))
        beginning = claim_and_begin(engine, settings)
        assert [one for one, _ in beginning.ended] == [missed]
        assert (
            world.row(missed).reason
            == "window_closed: the messaging window ends before the workspace's sending hours open"
        )
        assert world.row(fits).held_until is not None

    def test_rejected_when_scheduled(self, world: World) -> None:
        """A due date is rejected if the messaging window closes before sending hours begin.

        If sending hours begin before the messaging window closes, the due date is accepted.
        """
        put(world, CLOSED)
        missed, fits = (self.windowed(world, left) for left in (2 * HOUR, 5 * HOUR))
        due = datetime.now(UTC) + HOUR
        with Session(world.engine) as session, session.begin():
            kept = {"workspace_id": world.workspace_id, "message": "?", "due_date": due}
            with pytest.raises(
                OutsideMessagingWindowError, match=r"sending hours \(.*\)\. When they open, at .*Z, the"
            ):
                followups.schedule(session, chat_id=missed, **kept)
            created = followups.schedule(session, chat_id=fits, **kept)
            with pytest.raises(OutsideMessagingWindowError):
                amend(session, created.id, {"due_date": due + 4 * HOUR})
            amend(session, created.id, {"due_date": due + MINUTE})
            # Without a messaging window, any due date is accepted.
            followups.schedule(session, chat_id=world.chat(), **kept)

    def test_a_time_zone_unknown_to_this_host(self, world: World, capsys: pytest.CaptureFixture[str]) -> None:
        """If this host does not know the time zone, only the messaging window limits the due date.

        One log line reports the unreadable sending hours.
        """
        put(world, CLOSED)
        world.sql("UPDATE sending_hours SET time_zone = 'Atlantis/Capital'")
        due = datetime.now(UTC) + HOUR
        for _ in range(2):
            with Session(world.engine) as session, session.begin():
                kept = {"workspace_id": world.workspace_id, "message": "?", "due_date": due}
                created = followups.schedule(session, chat_id=self.windowed(world, 2 * HOUR), **kept)
                amend(session, created.id, {"due_date": due + MINUTE})
                with pytest.raises(OutsideMessagingWindowError):
                    followups.schedule(session, chat_id=self.windowed(world, HOUR / 2), **kept)
        logged = "".join(capsys.readouterr()).splitlines()
        (line,) = [line for line in logged if "sending_hours_unreadable" in line]
        assert str(world.workspace_id) in line


def test_held_follow_ups_can_be_cancelled_and_rescheduled(world: World, engine: Engine, settings: Settings) -> None:
    """A held follow-up can be cancelled or rescheduled; a new due date ends the hold."""
    put(world, CLOSED)
    cancelled, moved = world.follow_up(), world.follow_up()
    claim_and_begin(engine, settings)
    due = datetime.now(UTC) + 9 * HOUR
    with Session(engine) as session, session.begin():
        followups.cancel(session, cancelled, reason="never mind")
        amend(session, moved, {"due_date": due})
    assert world.row(cancelled).status == "cancelled"
    row = world.row(moved)
    assert (row.due_date, row.next_attempt_at, row.held_until) == (due, None, None)


def test_an_unknown_time_zone(world: World, engine: Engine, settings: Settings) -> None:
    """If a workspace's time zone is unknown, its follow-ups are held for a minute and checked again.

    No follow-up is sent while the time zone is unknown.
    """
    put(world, CLOSED)
    world.sql("UPDATE sending_hours SET time_zone = 'Mars/Olympus', open_until = now() - interval '1 day'")
    follow_up = world.follow_up()
    claim_and_begin(engine, settings)
    row = world.row(follow_up)
    assert timedelta(0) < row.next_attempt_at - world.scalar("SELECT now()") <= MINUTE + SPREAD


def test_other_time_zone_data(world: World, engine: Engine, settings: Settings) -> None:
    """If the database says that sending hours have not begun, a follow-up is held.

    The database's answer takes precedence over this host's time zone data. The follow-up is held until the stored
    opening time and is not checked repeatedly.
    """
    put(world, OPEN)
    world.sql("UPDATE sending_hours SET open_from = now() + interval '1 h'")
    follow_up = world.follow_up()
    beginning = claim_and_begin(engine, settings)
    assert (beginning.begun, beginning.retry_later) == ((), ())
    assert world.row(follow_up).held_until == world.scalar("SELECT open_from FROM sending_hours")


@pytest.mark.parametrize("zone", ["", "Nowhere/Else", "a\x00b"])
def test_a_bad_time_zone_is_refused(world: World, zone: str) -> None:
    """Sending hours with an unknown time zone are rejected."""
    with Session(world.engine) as session, pytest.raises(InvalidRequestError, match="There is no time zone"):
        sending_hours.put(session, world.workspace_id, SendingHours(zone, time(8), time(20), EVERY_DAY))
    with Session(world.engine) as session:
        assert sending_hours.find(session, uuid4()) is None


def test_hours_that_are_never_open_are_refused(world: World) -> None:
    """Sending hours that include no days are rejected."""
    with Session(world.engine) as session, pytest.raises(InvalidRequestError, match="These hours are never open"):
        sending_hours.put(session, world.workspace_id, SendingHours("UTC", time(8), time(20), frozenset()))

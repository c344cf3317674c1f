"""Claim, begin and settle on PostgreSQL: each guard of the protocol."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

import followups
from followups.delivery import dispatcher
from followups.delivery.attempts import Attempt
from followups.delivery.begin import begin
from followups.delivery.claim import MAX_LOSSES, claim
from followups.delivery.send import checked
from followups.delivery.settle import settle
from followups.errors import AlreadyFinishedError, DeliveryInProgressError, InvalidRequestError
from followups.scheduling import amend
from followups.store import chat_order, chats, claims, leases
from followups.transports.port import Rejected, Retry, Sent, Snoozed, Unknown
from followups.uptime import uptime
from stack import wait_until

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from followups.delivery.attempts import Begun
    from followups.delivery.hints import Hint
    from followups.settings import Settings
    from followups.store.leases import Lease
    from followups.transports.port import Outcome
    from world import World

SECOND = timedelta(seconds=1)


def one_lease(engine: Engine, settings: Settings) -> Lease:
    """Claim, and return the only lease."""
    (lease,) = claim(engine, settings).leases
    return lease


def one_begun(engine: Engine, settings: Settings) -> Begun:
    """Claim and begin, and return the only attempt in flight."""
    (begun,) = begin(engine, settings, claim(engine, settings).leases).begun
    return begun


def attempt(begun: Begun, outcome: Outcome) -> Attempt:
    """Return the attempt as the transport would return it."""
    return Attempt(begun, checked(outcome), timedelta(milliseconds=1), uptime(), datetime.now(UTC))


def reply(world: World, chat_id: UUID, role: chats.Role = chats.Role.USER) -> tuple[UUID, ...]:
    """Let a chat message arrive; return what it cancelled."""
    with Session(world.engine) as session, session.begin():
        received = chats.receive(
            session, world.workspace_id, message_id=uuid4(), chat_id=chat_id, role=role, created_at=None
        )
    return received.cancelled


class TestClaim:
    """Claim leases what is due, and nothing else."""

    def test_look_ahead(self, world: World, engine: Engine, settings: Settings) -> None:
        """A tick claims what falls due within two intervals, by due date, and nothing later."""
        second = world.follow_up(due=settings.tick_interval)
        first = world.follow_up(due=-SECOND)
        world.follow_up(due=settings.tick_interval * 20)
        assert [lease.id for lease in claim(engine, settings).leases] == [first, second]

    def test_leased_is_not_claimed_again(self, world: World, engine: Engine, settings: Settings) -> None:
        """A leased follow-up is not claimed until the lease ends; then it gets a greater token at no cost."""
        follow_up = world.follow_up()
        lease = one_lease(engine, settings)
        assert claim(engine, settings).leases == ()
        world.expire(follow_up)
        assert one_lease(engine, settings).token > lease.token
        row = world.row(follow_up)
        assert (row.attempts, row.losses, row.snoozes) == (0, 0, 0)

    def test_window_bounds_what_is_in_flight(self, world: World, engine: Engine, settings: Settings) -> None:
        """Ticks claim no more than MAX_IN_FLIGHT in total, and report that there is more."""
        bounded = settings.model_copy(update={"max_in_flight": 3})
        for _ in range(5):
            world.follow_up()
        first, second = claim(engine, bounded), claim(engine, bounded)
        assert (len(first.leases), first.more) == (3, True)
        assert (len(second.leases), second.more) == (0, True)

    def test_two_at_once_share(self, world: World, engine: Engine, settings: Settings) -> None:
        """Claims that run at once never lease the same follow-up twice."""
        for _ in range(40):
            world.follow_up()
        taken: list[UUID] = []
        start = threading.Barrier(4)

        def run() -> None:
            start.wait()
            taken.extend(lease.id for lease in claim(engine, settings).leases)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken.extend(lease.id for lease in claim(engine, settings).leases)
        assert len(taken) == len(set(taken)) == 40

    def test_earliest_first(self, world: World, engine: Engine, settings: Settings) -> None:
        """A claim takes the earliest first, whatever the order they were inserted in."""
        due = [timedelta(seconds=-n) for n in (1, 5, 3)]
        ids = [world.follow_up(due=one) for one in due]
        assert [lease.id for lease in claim(engine, settings).leases] == [ids[1], ids[2], ids[0]]

    def test_window_with_earlier_ones_behind(self, world: World, engine: Engine, settings: Settings) -> None:
        """Rows that come in with an earlier due date count together with those in flight."""
        bounded = settings.model_copy(update={"max_in_flight": 3})
        for group in range(1, 3):
            for _ in range(3):
                world.follow_up(due=-group * SECOND)
            claim(engine, bounded)
        assert world.scalar("SELECT count(*) FROM follow_ups WHERE lease_until > now()") == 3

    def test_held_by_somebody(self, world: World, engine: Engine, settings: Settings) -> None:
        """Locked rows are skipped, and hide no others."""
        bounded = settings.model_copy(update={"max_in_flight": 2})
        held, free = world.follow_up(due=-SECOND), world.follow_up()
        with engine.connect() as connection:
            connection.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": held})
            assert [lease.id for lease in claim(engine, bounded).leases] == [free]


class TestRecovery:
    """A lease that ended in flight means an unknown outcome."""

    def lose(self, world: World, engine: Engine, settings: Settings, follow_up: UUID) -> None:
        one_begun(engine, settings)
        world.expire(follow_up)

    def test_sent_again_where_the_transport_deduplicates(
        self, world: World, engine: Engine, settings: Settings
    ) -> None:
        """A lost attempt is made again under the same number: it counts as a loss, not as an attempt."""
        follow_up = world.follow_up()
        self.lose(world, engine, settings, follow_up)
        begun = one_begun(engine, settings)
        assert (begun.delivery.attempt, world.row(follow_up).losses) == (1, 1)
        assert [(number, outcome) for number, outcome, _ in world.failures(follow_up)] == [(1, "lost")]

    def test_named_where_it_does_not(self, world: World, engine: Engine, settings: Settings) -> None:
        """Where the transport cannot deduplicate, a lost attempt ends as outcome_unknown and is not made again."""
        plain = settings.model_copy(update={"transport_deduplicates": False})
        follow_up = world.follow_up()
        self.lose(world, engine, plain, follow_up)
        assert claim(engine, plain).leases == ()
        row = world.row(follow_up)
        assert (row.status, row.reason.partition(":")[0]) == ("failed", "outcome_unknown")

    def test_poison(self, world: World, engine: Engine, settings: Settings) -> None:
        """A follow-up that loses its third worker is quarantined as worker_lost."""
        follow_up = world.follow_up()
        for _ in range(MAX_LOSSES):
            self.lose(world, engine, settings, follow_up)
        assert claim(engine, settings).leases == ()
        row = world.row(follow_up)
        assert (row.status, row.reason.partition(":")[0]) == ("failed", "worker_lost")

    def test_reply_meanwhile(self, world: World, engine: Engine, settings: Settings) -> None:
        """A reply to a follow-up in flight keeps it from being sent again after its worker was lost."""
        chat = world.chat()
        follow_up = world.follow_up(chat)
        one_begun(engine, settings)
        assert reply(world, chat) == ()
        world.expire(follow_up)
        assert claim(engine, settings).leases == ()
        row = world.row(follow_up)
        assert (row.status, row.reason.partition(":")[0]) == ("cancelled", "user_replied")


class TestBegin:
    """Begin looks at the world again."""

    def test_once(self, world: World, engine: Engine, settings: Settings) -> None:
        """A hint that is delivered twice begins one attempt."""
        world.follow_up()
        lease = one_lease(engine, settings)
        assert len(begin(engine, settings, [lease, lease]).begun) == 1
        assert begin(engine, settings, [lease]).begun == ()

    def test_old_token(self, world: World, engine: Engine, settings: Settings) -> None:
        """A hint under an older token begins nothing."""
        follow_up = world.follow_up()
        old = one_lease(engine, settings)
        world.expire(follow_up)
        one_lease(engine, settings)
        assert begin(engine, settings, [old]).begun == ()
        assert world.row(follow_up).begun_at is None

    def test_forged(self, world: World, engine: Engine, settings: Settings) -> None:
        """A forged hint, for a follow-up that is not leased or does not exist, begins nothing."""
        follow_up = world.follow_up(due=timedelta(hours=1))
        forged = [leases.Lease(follow_up, 0, datetime.now(UTC)), leases.Lease(uuid4(), 1, datetime.now(UTC))]
        assert begin(engine, settings, forged).begun == ()

    def test_expired_lease(self, world: World, engine: Engine, settings: Settings) -> None:
        """A lease that expired in the due queue is not begun."""
        follow_up = world.follow_up()
        lease = one_lease(engine, settings)
        world.expire(follow_up)
        assert begin(engine, settings, [lease]).begun == ()

    def test_cancelled_in_the_queue(self, world: World, engine: Engine, settings: Settings) -> None:
        """A follow-up cancelled while its batch waits is never begun."""
        follow_up = world.follow_up()
        lease = one_lease(engine, settings)
        with Session(engine) as session, session.begin():
            followups.cancel(session, follow_up, reason="the customer called")
        assert begin(engine, settings, [lease]).begun == ()
        assert (world.row(follow_up).status, world.row(follow_up).reason) == ("cancelled", "the customer called")

    def test_rescheduled_in_the_queue(self, world: World, engine: Engine, settings: Settings) -> None:
        """A follow-up rescheduled while its batch waits is not begun under the old hint."""
        follow_up = world.follow_up()
        lease = one_lease(engine, settings)
        with Session(engine) as session, session.begin():
            amend(session, follow_up, {"due_date": datetime.now(UTC) + timedelta(hours=1)})
        assert begin(engine, settings, [lease]).begun == ()
        assert world.row(follow_up).status == "pending"

    @pytest.mark.parametrize(
        ("columns", "status", "code"),
        [
            ({"removed_at": text("now()")}, "cancelled", "chat_removed"),
            ({"last_message_role": "user"}, "cancelled", "user_replied"),
            ({"channel": "whatsapp"}, "failed", "window_closed"),
            (
                {"channel": "instagram", "last_user_message_at": text("now() - interval '24 h'")},
                "failed",
                "window_closed",
            ),
        ],
    )
    def test_world(
        self, world: World, engine: Engine, settings: Settings, columns: dict[str, object], status: str, code: str
    ) -> None:
        """A removed chat, a broken silence or a closed window ends the follow-up right before it would be sent."""
        follow_up = world.follow_up(world.chat(**columns))
        beginning = begin(engine, settings, [one_lease(engine, settings)])
        assert beginning.begun == ()
        assert [(one, final.status, final.reason) for one, final in beginning.ended] == [(follow_up, status, code)]
        assert (world.row(follow_up).status, world.row(follow_up).reason) == (status, code)

    def test_open_window(self, world: World, engine: Engine, settings: Settings) -> None:
        """Within 24 hours of the user's last message a windowed channel is sent to."""
        world.follow_up(world.chat(channel="whatsapp", last_user_message_at=text("now() - interval '23 h 59 min'")))
        assert one_begun(engine, settings).delivery.channel == "whatsapp"

    @pytest.mark.parametrize(("scheduled", "begun"), [("now() - interval '1 day'", 0), ("now()", 1)])
    def test_lateness(self, world: World, engine: Engine, settings: Settings, scheduled: str, begun: int) -> None:
        """Lateness counts from the due date, or from when it was set: a due date in the past means at once."""
        follow_up = world.follow_up(due=timedelta(days=-1), scheduled_at=text(scheduled))
        assert len(begin(engine, settings, [one_lease(engine, settings)]).begun) == begun
        assert world.row(follow_up).reason == (None if begun else "too_late")

    def test_no_limit_of_lateness(self, world: World, engine: Engine, settings: Settings) -> None:
        """A lateness of 0 means that nothing is ever too late."""
        world.follow_up(due=timedelta(days=-400), scheduled_at=text("now() - interval '400 days'"))
        patient = settings.model_copy(update={"max_lateness": timedelta(0)})
        assert one_begun(engine, patient).delivery.attempt == 1

    def test_open_transaction_of_a_caller(self, world: World, engine: Engine, settings: Settings) -> None:
        """A row locked by a caller's open transaction is tried again, and delays nothing else."""
        held, other = world.follow_up(), world.follow_up()
        batch = claim(engine, settings).leases
        with Session(engine) as session:
            followups.cancel(session, held, reason=None)
            beginning = begin(engine, settings, batch)
            assert [one.lease.id for one in beginning.begun] == [other]
            assert [lease.id for lease in beginning.locked] == [held]
            session.rollback()
        assert [one.lease.id for one in begin(engine, settings, beginning.locked).begun] == [held]


class TestOrder:
    """In a chat, one follows the other."""

    def test_later_waits_and_is_woken(self, world: World, engine: Engine, settings: Settings) -> None:
        """The later of two is parked, not claimed again, and leased to the worker that settles the earlier one."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        beginning = begin(engine, settings, claim(engine, settings).leases)
        assert [one.lease.id for one in beginning.begun] == [first]
        assert world.row(second).waits_for == first
        assert claim(engine, settings).leases == ()
        settling = settle(engine, settings, [attempt(beginning.begun[0], Sent())])
        assert [lease.id for lease in settling.unblocked] == [second]
        assert [one.lease.id for one in begin(engine, settings, settling.unblocked).begun] == [second]

    def test_pile(self, world: World, engine: Engine, settings: Settings) -> None:
        """With one that is refused all that are due behind it are parked, each behind the one before it; not others."""
        chat, seen = world.chat(), settings.model_copy(update={"max_in_flight": 3})
        ids = [world.follow_up(chat, (number - 30) * SECOND) for number in range(20)]
        ahead, elsewhere = world.follow_up(chat, timedelta(hours=1)), world.follow_up(due=-SECOND)
        beginning = begin(engine, settings, claim(engine, seen).leases)
        assert [one.lease.id for one in beginning.begun] == ids[:1]
        assert [world.row(one).waits_for for one in ids] == [None, *ids[:-1]]
        assert world.row(ahead).waits_for is None
        assert [lease.id for lease in claim(engine, settings).leases] == [elsewhere]
        sent: list[UUID] = []
        while beginning.begun:
            sent += [one.lease.id for one in beginning.begun]
            settling = settle(engine, settings, [attempt(one, Sent()) for one in beginning.begun])
            beginning = begin(engine, settings, settling.unblocked)
        assert sent == ids

    def test_pile_that_somebody_holds(self, world: World, engine: Engine, settings: Settings) -> None:
        """A locked row of a pile is skipped; those behind it still wait."""
        chat = world.chat()
        first, second, held, last = (world.follow_up(chat, (number - 9) * SECOND) for number in range(4))
        batch = claim(engine, settings).leases[:2]
        with Session(engine) as session:
            session.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": held})
            begin(engine, settings, batch)
        assert [world.row(one).waits_for for one in (first, second, held, last)] == [None, first, None, second]

    def test_later_waits_through_retries(self, world: World, engine: Engine, settings: Settings) -> None:
        """The later one does not overtake an earlier one that is to be tried again."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        beginning = begin(engine, settings, claim(engine, settings).leases)
        settle(engine, settings, [attempt(beginning.begun[0], Retry("HTTP 500"))])
        assert world.row(first).status == "pending"
        assert world.row(second).waits_for == first

    def test_cancel_wakes(self, world: World, engine: Engine, settings: Settings) -> None:
        """A cancel of the earlier one lets the later one be claimed."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        batch = claim(engine, settings).leases
        begin(engine, settings, [lease for lease in batch if lease.id == second])
        assert world.row(second).waits_for == first
        with Session(engine) as session, session.begin():
            followups.cancel(session, first, reason="enough")
        assert [lease.id for lease in claim(engine, settings).leases] == [second]

    def test_put_off_wakes(self, world: World, engine: Engine, settings: Settings) -> None:
        """When the earlier one is deferred behind the later one, the later one goes first."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        batch = claim(engine, settings).leases
        begin(engine, settings, [lease for lease in batch if lease.id == second])
        with Session(engine) as session, session.begin():
            amend(session, first, {"due_date": datetime.now(UTC) + timedelta(hours=1)})
        assert one_begun(engine, settings).lease.id == second

    def test_end_before_the_attempt_wakes(self, world: World, engine: Engine, settings: Settings) -> None:
        """A follow-up that ends at begin, without an attempt, leases the next of its chat to the same worker."""
        chat = world.chat()
        long_ago = text("now() - interval '2 days'")
        world.follow_up(chat, timedelta(days=-2), scheduled_at=long_ago)
        second = world.follow_up(chat, -SECOND)
        early, late = claim(engine, settings).leases
        begin(engine, settings, [late])
        assert [lease.id for lease in begin(engine, settings, [early]).unblocked] == [second]

    def test_many_behind_one_stuck(self, world: World, engine: Engine, settings: Settings) -> None:
        """Each of many behind a stuck one is refused once, waits for the one before it, and is not scanned again."""
        chat = world.chat()
        ids = [world.follow_up(chat, timedelta(seconds=n - 30)) for n in range(20)]
        begin(engine, settings, claim(engine, settings).leases)
        assert [world.row(one).waits_for for one in ids] == [None, *ids[:-1]]
        assert claim(engine, settings).leases == ()

    def test_no_longer_before_it(self, world: World, engine: Engine, settings: Settings) -> None:
        """An earlier one that was rescheduled at that moment is not waited for."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        lease = next(one for one in claim(engine, settings).leases if one.id == second)
        with Session(engine) as session, session.begin():
            amend(session, first, {"due_date": datetime.now(UTC) + timedelta(hours=1)})
        with engine.begin() as connection:  # as begin does, which had looked before the change
            assert chat_order.park_if_leased(connection, [(lease, first)]) == set()


class TestSettle:
    """Settle records once, under the lease, what the transport said."""

    def test_sent(self, world: World, engine: Engine, settings: Settings) -> None:
        """An accepted message is sent: its id, when it was accepted, no reason, no lease."""
        follow_up, message_id = world.follow_up(), uuid4()
        (settled,) = settle(engine, settings, [attempt(one_begun(engine, settings), Sent(message_id))]).settled
        row = world.row(follow_up)
        assert (row.status, row.chat_message_id, row.reason, row.lease_until) == ("sent", message_id, None, None)
        assert settled.lag == row.accepted_at - row.due_date
        assert row.due_date <= row.accepted_at <= row.finished_at + SECOND

    def test_rejected(self, world: World, engine: Engine, settings: Settings) -> None:
        """A refusal for good ends it as rejected, with the transport's words."""
        follow_up = world.follow_up()
        settle(engine, settings, [attempt(one_begun(engine, settings), Rejected("HTTP 403 no\x00way", 403))])
        assert world.row(follow_up).reason == "rejected: HTTP 403 no\N{REPLACEMENT CHARACTER}way"
        assert [one[:2] for one in world.failures(follow_up)] == [(1, "rejected")]

    def test_retry_is_a_due_time_in_the_row(self, world: World, engine: Engine, settings: Settings) -> None:
        """A retry puts the next try into the row, uses up an attempt, and keeps the failed one on record."""
        follow_up = world.follow_up()
        settle(engine, settings, [attempt(one_begun(engine, settings), Retry("HTTP 500", timedelta(minutes=5), 500))])
        row = world.row(follow_up)
        assert timedelta(minutes=4) < row.next_attempt_at - row.due_date < timedelta(minutes=6)
        assert (row.status, row.attempts, row.begun_at, row.lease_until) == ("pending", 1, None, None)
        assert world.failures(follow_up) == [(1, "retry", "HTTP 500")]
        assert claim(engine, settings).leases == ()

    def test_last_attempt(self, world: World, engine: Engine, settings: Settings) -> None:
        """The last allowed attempt that fails ends it as retries_exhausted, with the last error."""
        follow_up = world.follow_up(attempts=settings.max_attempts - 1)
        settle(engine, settings, [attempt(one_begun(engine, settings), Retry("HTTP 502"))])
        assert world.row(follow_up).reason == "retries_exhausted: HTTP 502"

    def test_snooze_uses_up_no_attempt(self, world: World, engine: Engine, settings: Settings) -> None:
        """A rate limit puts it off and leaves the number of the next attempt as it was."""
        follow_up = world.follow_up(attempts=settings.max_attempts - 1)
        settle(engine, settings, [attempt(one_begun(engine, settings), Snoozed("HTTP 429", SECOND))])
        row = world.row(follow_up)
        assert (row.status, row.attempts, row.snoozes) == ("pending", settings.max_attempts - 1, 1)

    @pytest.mark.parametrize(("deduplicates", "status"), [(True, "pending"), (False, "failed")])
    def test_unknown(
        self,
        world: World,
        engine: Engine,
        settings: Settings,
        deduplicates: bool,  # noqa: FBT001 - a parameter of the test
        status: str,
    ) -> None:
        """An unknown outcome is tried again with the same key, or named where the transport cannot deduplicate."""
        follow_up = world.follow_up()
        chosen = settings.model_copy(update={"transport_deduplicates": deduplicates})
        settle(engine, chosen, [attempt(one_begun(engine, chosen), Unknown("timeout"))])
        row = world.row(follow_up)
        assert (row.status, row.reason) == (status, None if deduplicates else "outcome_unknown: timeout")

    def test_stale_writer(self, world: World, engine: Engine, settings: Settings) -> None:
        """A worker that was frozen past its lease settles nothing, and is counted."""
        follow_up = world.follow_up()
        frozen = one_begun(engine, settings)
        world.expire(follow_up)
        current = one_begun(engine, settings)
        settling = settle(engine, settings, [attempt(frozen, Rejected("HTTP 400"))])
        assert (settling.settled, settling.stale) == ((), 1)
        assert world.row(follow_up).status == "pending"
        settle(engine, settings, [attempt(current, Sent())])
        assert world.row(follow_up).status == "sent"

    def test_twice(self, world: World, engine: Engine, settings: Settings) -> None:
        """The same result settled twice, as after a commit whose answer was lost, counts once."""
        follow_up = world.follow_up()
        result = attempt(one_begun(engine, settings), Snoozed("HTTP 429", SECOND))
        settle(engine, settings, [result])
        assert settle(engine, settings, [result]).stale == 1
        assert world.row(follow_up).snoozes == 1

    @pytest.mark.parametrize(
        ("outcome", "status"),
        [
            (Sent(), "sent"),
            (Retry("HTTP 500"), "cancelled"),
            (Rejected("HTTP 400"), "cancelled"),
            (Snoozed("HTTP 429"), "cancelled"),
            (Unknown("timeout"), "cancelled"),
        ],
    )
    def test_reply_in_flight(
        self, world: World, engine: Engine, settings: Settings, outcome: Outcome, status: str
    ) -> None:
        """After a reply in flight: sent if the attempt succeeds, else cancelled; never tried again."""
        chat = world.chat()
        follow_up = world.follow_up(chat)
        begun = one_begun(engine, settings)
        assert reply(world, chat) == ()
        settle(engine, settings, [attempt(begun, outcome)])
        row = world.row(follow_up)
        assert row.status == status
        assert status == "sent" or row.reason.partition(":")[0] == "user_replied"

    def test_callers_open_transaction(self, world: World, engine: Engine, settings: Settings) -> None:
        """A locked row is settled later, and delays no other result."""
        held, other = world.follow_up(), world.follow_up()
        begun = begin(engine, settings, claim(engine, settings).leases).begun
        results = [attempt(one, Sent()) for one in begun]
        with engine.connect() as connection:
            connection.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": held})
            settling = settle(engine, settings, results)
            assert [one.id for one in settling.settled] == [other]
            assert ([lease.id for lease in settling.locked], settling.stale) == ([held], 0)
        settle(engine, settings, [one for one in results if one.begun.lease in settling.locked])
        assert world.row(held).status == "sent"

    def test_refused_cancel_holds_nothing(self, world: World, engine: Engine, settings: Settings) -> None:
        """A caller that keeps its transaction open after a 409 does not delay the settlement."""
        follow_up = world.follow_up()
        begun = one_begun(engine, settings)
        with Session(engine) as session:
            with pytest.raises(DeliveryInProgressError):
                followups.cancel(session, follow_up, reason=None)
            settle(engine, settings, [attempt(begun, Sent())])
        assert world.row(follow_up).status == "sent"

    def test_next_of_its_chat_is_held(self, world: World, engine: Engine, settings: Settings) -> None:
        """If the next one of the chat is locked, settle continues, and the next one is not forgotten."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        beginning = begin(engine, settings, claim(engine, settings).leases)
        with Session(engine) as session:
            followups.cancel(session, second, reason=None)
            assert settle(engine, settings, [attempt(beginning.begun[0], Sent())]).unblocked == ()
            session.rollback()
        assert world.row(first).status == "sent"
        assert claim(engine, settings).leases == ()
        with engine.begin() as connection:
            assert chat_order.unblock_forgotten(connection) == 1
        assert one_begun(engine, settings).lease.id == second

    def test_what_waits_rightly_is_not_woken(self, world: World, engine: Engine, settings: Settings) -> None:
        """Looking for the forgotten leaves alone what waits for an earlier one that is pending."""
        chat = world.chat()
        world.follow_up(chat, -2 * SECOND)
        world.follow_up(chat, -SECOND)
        begin(engine, settings, claim(engine, settings).leases)
        with engine.begin() as connection:
            assert chat_order.unblock_forgotten(connection) == 0


class TestCancelAgainstDeliver:
    """A cancel that was acknowledged is final."""

    def test_in_flight(self, world: World, engine: Engine, settings: Settings) -> None:
        """A follow-up in flight cannot be cancelled."""
        follow_up = world.follow_up()
        one_begun(engine, settings)
        with Session(engine) as session, pytest.raises(DeliveryInProgressError):
            followups.cancel(session, follow_up, reason=None)

    def test_finished(self, world: World, engine: Engine, settings: Settings) -> None:
        """A sent follow-up cannot be cancelled."""
        follow_up = world.follow_up()
        settle(engine, settings, [attempt(one_begun(engine, settings), Sent())])
        with Session(engine) as session, pytest.raises(AlreadyFinishedError):
            followups.cancel(session, follow_up, reason=None)

    def test_takeover_cancels_leased_and_unleased(self, world: World, engine: Engine, settings: Settings) -> None:
        """An operator's message cancels all that is pending in the chat, claimed or not."""
        chat = world.chat()
        leased = world.follow_up(chat)
        claim(engine, settings)
        later = world.follow_up(chat, timedelta(hours=1))
        other = world.follow_up()
        assert set(reply(world, chat, chats.Role.OPERATOR)) == {leased, later}
        assert world.row(leased).reason == "human_takeover"
        assert world.row(other).status == "pending"

    def test_race(self, world: World, engine: Engine, settings: Settings) -> None:
        """Of a cancel and a begin at once exactly one wins, fifty times over."""
        for _ in range(50):
            follow_up = world.follow_up()
            # On a slow machine, those of earlier rounds in flight may be claimed again.
            batch = tuple(lease for lease in claim(engine, settings).leases if lease.id == follow_up)
            start = threading.Barrier(2)
            begun: list[int] = []

            def run(batch: tuple[Lease, ...] = batch, start: threading.Barrier = start) -> None:
                start.wait()
                begun.append(len(begin(engine, settings, batch).begun))  # noqa: B023 - joined below

            thread = threading.Thread(target=run)
            thread.start()
            start.wait()
            try:
                with Session(engine) as session, session.begin():
                    followups.cancel(session, follow_up, reason=None)
                cancelled = 1
            except DeliveryInProgressError:
                cancelled = 0
            thread.join()
            assert cancelled + begun[0] == 1
            assert world.row(follow_up).status == ("cancelled" if cancelled else "pending")


def test_release(world: World, engine: Engine, settings: Settings) -> None:
    """Follow-ups released by a draining worker can be claimed at once; begun ones are not released."""
    begun, waiting = world.follow_up(), world.follow_up()
    batch = claim(engine, settings).leases
    begin(engine, settings, [lease for lease in batch if lease.id == begun])
    with engine.begin() as connection:
        assert leases.release_if_not_begun(connection, batch) == 1
    assert [lease.id for lease in claim(engine, settings).leases] == [waiting]


def test_lag_of_a_result_that_waited(world: World, engine: Engine, settings: Settings) -> None:
    """Lag is taken at the acceptance, however long the result then waited for its settlement."""
    follow_up = world.follow_up()
    result = attempt(one_begun(engine, settings), Sent())
    settle(engine, settings, [result._replace(answered=result.answered - 7)])
    row = world.row(follow_up)
    assert timedelta(seconds=-8) < row.accepted_at - row.finished_at < timedelta(seconds=-6)


@pytest.mark.parametrize("due", [datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)])
def test_edge_of_the_calendar(world: World, engine: Engine, due: datetime) -> None:
    """A due date that cannot be read in every time zone is refused in words."""
    chat = world.chat()
    with Session(engine) as session, pytest.raises(InvalidRequestError, match="years 2 to 9998"):
        followups.schedule(session, workspace_id=world.workspace_id, chat_id=chat, message="Hello?", due_date=due)


def test_losses_are_told(world: World, engine: Engine, settings: Settings) -> None:
    """A lease carries the number of lost leases, so that its last try happens alone."""
    follow_up = world.follow_up()
    told = []
    for _ in range(MAX_LOSSES):
        lease = one_lease(engine, settings)
        told.append(lease.losses)
        begin(engine, settings, [lease])
        world.expire(follow_up)
    assert told == [0, 1, 2]


def test_losses_are_told_of_what_is_woken(world: World, engine: Engine, settings: Settings) -> None:
    """A follow-up unblocked in its chat keeps its number of lost leases."""
    chat = world.chat()
    earlier = world.follow_up(chat, -SECOND)
    later = world.follow_up(chat, losses=2, waits_for=earlier)
    settling = settle(engine, settings, [attempt(one_begun(engine, settings), Sent())])
    assert [(lease.id, lease.losses) for lease in settling.unblocked] == [(later, 2)]


def test_settle_of_all_kinds_together(world: World, engine: Engine, settings: Settings) -> None:
    """In one batch each result comes to its own, whatever the others are."""
    chat = world.chat()
    sent, again, refused, stale, held = (world.follow_up(due=-SECOND * n) for n in range(6, 1, -1))
    first = world.follow_up(chat, -SECOND)
    begun = {one.lease.id: one for one in begin(engine, settings, claim(engine, settings).leases).begun}
    second = world.follow_up(chat)
    begin(engine, settings, [one_lease(engine, settings)])  # it waits for the first
    with engine.begin() as connection:
        wish = "UPDATE follow_ups SET cancel_requested = 'user_replied' WHERE id IN (:sent, :again)"
        connection.execute(text(wish), {"sent": sent, "again": again})
        connection.execute(text("UPDATE follow_ups SET lease_token = lease_token + 1 WHERE id = :id"), {"id": stale})
    outcomes = {
        again: Retry("later"),
        sent: Sent(uuid4()),
        refused: Rejected("no"),
        held: Sent(),
        stale: Sent(),
        first: Sent(),
    }
    batch = [attempt(begun[one], outcome) for one, outcome in outcomes.items()]
    with engine.begin() as somebody:
        somebody.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": held})
        settling = settle(engine, settings, batch)
    assert {one: world.row(one).status for one in outcomes} == {
        sent: "sent",
        again: "cancelled",
        refused: "failed",
        held: "pending",
        stale: "pending",
        first: "sent",
    }
    assert [lease.id for lease in settling.locked] == [held]
    assert (len(settling.settled), settling.stale) == (4, 1)
    assert [lease.id for lease in settling.unblocked] == [second]
    assert [len(world.failures(one)) for one in outcomes] == [1, 0, 1, 0, 0, 0]


class TestLowWater:
    """The low-water mark: rows that a claim need not read again."""

    def test_mark(self, world: World, engine: Engine, settings: Settings) -> None:
        """It stays behind the first that has not ended, leased or not, and behind now."""
        world.follow_up(due=-timedelta(minutes=5))
        for _ in range(2):  # free, then leased
            low = claim(engine, settings).low_water
            assert timedelta(minutes=5) < datetime.now(UTC) - low < timedelta(minutes=6)

    def test_nothing_is_due(self, engine: Engine, settings: Settings) -> None:
        """Without anything due it is a margin before now, for late commits."""
        low = claim(engine, settings).low_water
        assert timedelta(0) < datetime.now(UTC) - low - claims.LOW_WATER_MARGIN < timedelta(minutes=1)

    def test_what_came_in_behind(self, world: World, engine: Engine, settings: Settings) -> None:
        """A claim from the mark on passes it over; one from the beginning takes it."""
        low = claim(engine, settings).low_water
        world.follow_up(due=-timedelta(minutes=5))
        assert not claim(engine, settings, low).leases
        assert len(claim(engine, settings).leases) == 1

    def test_dispatcher_looks_behind(
        self, world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where looking at all is slow, one tick is enough to have what came in behind the mark claimed, too."""
        monkeypatch.setattr(dispatcher, "QUICK", 0.0)
        monkeypatch.setattr(dispatcher, "LOOKING_SHARE", 0.005)  # a second or so between two such looks
        hints: list[Hint] = []
        ticking = dispatcher.Dispatcher(settings, engine, hints.append)
        ticking.start()
        ticking.tick()
        wait_until(lambda: world.scalar("SELECT last_tick_at FROM dispatcher_state"))
        world.follow_up(due=-timedelta(minutes=5))
        ticking.tick()
        wait_until(lambda: hints)
        ticking.stop()
        assert len(hints) == 1

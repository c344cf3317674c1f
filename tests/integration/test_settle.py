"""Tests of settle on PostgreSQL: outcomes are recorded once, and confirmed cancellations are final."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

import followups
from followups.errors import AlreadyFinishedError, DeliveryInProgressError, InvalidRequestError
from followups.store import chat_order, chats, leases
from followups.transports.port import Rejected, Retry, Sent, Snoozed, Unknown
from stack import wait_until
from steps import attempt, reply

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from followups.settings import Settings
    from followups.store.leases import Lease
    from followups.transports.port import Outcome
    from steps import Steps
    from world import World

SECOND = timedelta(seconds=1)


class TestSettle:
    """Settle records each attempt's outcome once, and only under the attempt's lease."""

    def test_sent(self, world: World, steps: Steps) -> None:
        """If the receiver accepts a message, the follow-up is recorded as sent with the message id and time."""
        follow_up, message_id = world.follow_up(), uuid4()
        (settled,) = steps.settle([attempt(steps.begun(), Sent(message_id))]).settled
        row = world.row(follow_up)
        assert (row.status, row.chat_message_id, row.reason, row.lease_until) == ("sent", message_id, None, None)
        assert settled.lag == (row.accepted_at - row.due_date).total_seconds()
        assert row.due_date <= row.accepted_at <= row.finished_at + SECOND
        assert row.accepted_duration == timedelta(milliseconds=1)

    def test_rejected(self, world: World, steps: Steps) -> None:
        """A rejected message ends the follow-up as rejected, with the transport's detail."""
        follow_up = world.follow_up()
        steps.settle([attempt(steps.begun(), Rejected("HTTP 403 no\x00way", 403))])
        assert world.row(follow_up).reason == "rejected: HTTP 403 no\N{REPLACEMENT CHARACTER}way"
        assert [one[:2] for one in world.failures(follow_up)] == [(1, "rejected")]

    def test_retry_is_a_due_time_in_the_row(self, world: World, steps: Steps) -> None:
        """When an attempt is to be retried, the next due time is stored in the row.

        The failed attempt is also stored.
        """
        follow_up = world.follow_up()
        steps.settle([attempt(steps.begun(), Retry("HTTP 500", timedelta(minutes=5), 500))])
        row = world.row(follow_up)
        assert timedelta(minutes=4) < row.next_attempt_at - row.due_date < timedelta(minutes=6)
        assert (row.status, row.attempts, row.begun_at, row.lease_until) == ("pending", 1, None, None)
        assert world.failures(follow_up) == [(1, "retry", "HTTP 500")]
        assert steps.claim().leases == ()

    @pytest.mark.parametrize(
        "outcome", [Retry("HTTP 500", timedelta(hours=1), 500), Snoozed("HTTP 429", timedelta(hours=1), 429)]
    )
    def test_no_retry_is_later_than_the_allowed_lateness(
        self, world: World, steps: Steps, settings: Settings, outcome: Outcome
    ) -> None:
        """If a retry would be too late, the follow-up ends when its allowed lateness ends, and frees its chat."""
        strict = settings.model_copy(update={"max_lateness": SECOND})
        follow_up = world.follow_up()
        steps.settle([attempt(steps.begun(strict), outcome)], strict)
        row = world.row(follow_up)
        assert SECOND < row.next_attempt_at - row.scheduled_at < 1.5 * SECOND
        wait_until(lambda: world.scalar("SELECT max(next_attempt_at) < now() FROM follow_ups"))
        ended = steps.begin(steps.claim(strict).leases, strict)
        assert [final.reason for _, final in ended.ended] == ["too_late"]

    def test_no_retry_is_later_than_the_messaging_window(self, world: World, steps: Steps) -> None:
        """If a retry would come after the messaging window, the follow-up ends when the window closes."""
        chat = world.chat(channel="whatsapp", last_user_message_at=datetime.now(UTC) - timedelta(hours=23))
        follow_up = world.follow_up(chat)
        steps.settle([attempt(steps.begun(), Snoozed("HTTP 429", timedelta(hours=24), 429))])
        left = world.row(follow_up).next_attempt_at - datetime.now(UTC)
        assert timedelta(minutes=59) < left < timedelta(minutes=61)

    def test_a_retry_after_the_allowed_lateness(self, world: World, steps: Steps, settings: Settings) -> None:
        """If the allowed lateness ended during the attempt, the follow-up is claimed again at once, and ends."""
        follow_up = world.follow_up()
        begun = steps.begun()
        strict = settings.model_copy(update={"max_lateness": timedelta(milliseconds=1)})
        steps.settle([attempt(begun, Retry("HTTP 500", timedelta(hours=1), 500))], strict)
        row = world.row(follow_up)
        assert row.next_attempt_at - row.scheduled_at < SECOND
        assert row.status == "pending"

    def test_last_attempt(self, world: World, steps: Steps, settings: Settings) -> None:
        """When the last allowed attempt fails, the follow-up ends as retries_exhausted with the last error."""
        follow_up = world.follow_up(attempts=settings.max_attempts - 1)
        steps.settle([attempt(steps.begun(), Retry("HTTP 502"))])
        assert world.row(follow_up).reason == "retries_exhausted: HTTP 502"

    def test_snoozed_uses_up_no_attempt(self, world: World, steps: Steps, settings: Settings) -> None:
        """A rate-limited follow-up is deferred and uses up no attempt."""
        follow_up = world.follow_up(attempts=settings.max_attempts - 1)
        steps.settle([attempt(steps.begun(), Snoozed("HTTP 429", SECOND))])
        row = world.row(follow_up)
        assert (row.status, row.attempts, row.snoozes) == ("pending", settings.max_attempts - 1, 1)

    @pytest.mark.parametrize(("deduplicates", "status"), [(True, "pending"), (False, "failed")])
    def test_unknown(
        self,
        world: World,
        steps: Steps,
        settings: Settings,
        deduplicates: bool,  # noqa: FBT001 - a test parameter
        status: str,
    ) -> None:
        """If the transport deduplicates, a message with an unknown outcome is sent again with the same key."""
        follow_up = world.follow_up()
        chosen = settings.model_copy(update={"transport_deduplicates": deduplicates})
        steps.settle([attempt(steps.begun(chosen), Unknown("timeout"))], chosen)
        row = world.row(follow_up)
        assert (row.status, row.reason) == (status, None if deduplicates else "outcome_unknown: timeout")

    def test_stale_writer(self, world: World, steps: Steps) -> None:
        """If a frozen worker's lease has been taken over, the worker's outcome is refused as stale."""
        follow_up = world.follow_up()
        frozen = steps.begun()
        world.expire(follow_up)
        current = steps.begun()
        settling = steps.settle([attempt(frozen, Rejected("HTTP 400"))])
        assert (settling.settled, settling.stale) == ((), 1)
        assert world.row(follow_up).status == "pending"
        steps.settle([attempt(current, Sent())])
        assert world.row(follow_up).status == "sent"

    def test_twice(self, world: World, steps: Steps) -> None:
        """If settle runs twice because a commit's response was lost, the result is counted once."""
        follow_up = world.follow_up()
        result = attempt(steps.begun(), Snoozed("HTTP 429", SECOND))
        steps.settle([result])
        assert steps.settle([result]).stale == 1
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
    def test_reply_in_flight(self, world: World, steps: Steps, outcome: Outcome, status: str) -> None:
        """If a reply arrives during an attempt, the follow-up ends as sent or cancelled.

        After a reply, a follow-up is never retried.
        """
        chat = world.chat()
        follow_up = world.follow_up(chat)
        begun = steps.begun()
        assert reply(world, chat) == ()
        steps.settle([attempt(begun, outcome)])
        row = world.row(follow_up)
        assert row.status == status
        assert status == "sent" or row.reason.partition(":")[0] == "user_replied"

    def test_callers_open_transaction(self, world: World, steps: Steps, engine: Engine) -> None:
        """A locked row delays only its own result, which is settled later."""
        held, other = world.follow_up(), world.follow_up()
        begun = steps.begin(steps.claim().leases).begun
        results = [attempt(one, Sent()) for one in begun]
        with engine.connect() as connection:
            connection.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": held})
            settling = steps.settle(results)
            assert [one.id for one in settling.settled] == [other]
            assert ([lease.id for lease in settling.retry_later], settling.stale) == ([held], 0)
        steps.settle([one for one in results if one.begun.lease in settling.retry_later])
        assert world.row(held).status == "sent"

    def test_a_refused_cancel_delays_nothing(self, world: World, steps: Steps, engine: Engine) -> None:
        """If a cancel is refused, the caller's open transaction does not delay settling."""
        follow_up = world.follow_up()
        begun = steps.begun()
        with Session(engine) as session:
            with pytest.raises(DeliveryInProgressError):
                followups.cancel(session, follow_up, reason=None)
            steps.settle([attempt(begun, Sent())])
        assert world.row(follow_up).status == "sent"

    def test_the_next_follow_up_of_the_chat_is_locked(self, world: World, steps: Steps, engine: Engine) -> None:
        """If a chat's next follow-up is locked, settle completes but does not unblock it yet."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        beginning = steps.begin(steps.claim().leases)
        with Session(engine) as session:
            followups.cancel(session, second, reason=None)
            assert steps.settle([attempt(beginning.begun[0], Sent())]).unblocked == ()
            session.rollback()
        assert world.row(first).status == "sent"
        assert steps.claim().leases == ()
        with engine.begin() as connection:
            assert chat_order.unblock_orphaned(connection) == 1
        assert steps.begun().lease.id == second

    def test_the_search_skips_blocked_follow_ups_of_pending_ones(
        self, world: World, steps: Steps, engine: Engine
    ) -> None:
        """The search for forgotten follow-ups skips follow-ups that wait for a pending one."""
        chat = world.chat()
        world.follow_up(chat, -2 * SECOND)
        world.follow_up(chat, -SECOND)
        steps.begin(steps.claim().leases)
        with engine.begin() as connection:
            assert chat_order.unblock_orphaned(connection) == 0


class TestCancelAgainstDeliver:
    """A confirmed cancel is final."""

    def test_in_flight(self, world: World, steps: Steps, engine: Engine) -> None:
        """A follow-up in flight cannot be cancelled."""
        follow_up = world.follow_up()
        steps.begun()
        with Session(engine) as session, pytest.raises(DeliveryInProgressError):
            followups.cancel(session, follow_up, reason=None)

    def test_finished(self, world: World, steps: Steps, engine: Engine) -> None:
        """A follow-up that has been sent cannot be cancelled."""
        follow_up = world.follow_up()
        steps.settle([attempt(steps.begun(), Sent())])
        with Session(engine) as session, pytest.raises(AlreadyFinishedError):
            followups.cancel(session, follow_up, reason=None)

    def test_takeover_cancels_leased_and_unleased(self, world: World, steps: Steps) -> None:
        """An operator's message cancels all pending follow-ups of the chat, whether claimed or not."""
        chat = world.chat()
        leased = world.follow_up(chat)
        steps.claim()
        later = world.follow_up(chat, timedelta(hours=1))
        other = world.follow_up()
        assert set(reply(world, chat, chats.Role.OPERATOR)) == {leased, later}
        assert world.row(leased).reason == "human_takeover"
        assert world.row(other).status == "pending"

    def test_race(self, world: World, steps: Steps, engine: Engine) -> None:
        """If a cancel and a begin run concurrently, exactly one of them succeeds."""
        for _ in range(50):
            follow_up = world.follow_up()
            # On a slow machine, follow-ups in flight from earlier rounds may be claimed again.
            batch = tuple(lease for lease in steps.claim().leases if lease.id == follow_up)
            start = threading.Barrier(2)
            begun: list[int] = []

            def run(batch: tuple[Lease, ...] = batch, start: threading.Barrier = start) -> None:
                start.wait()
                begun.append(len(steps.begin(batch).begun))  # noqa: B023 - the threads end within the iteration

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


def test_release(world: World, steps: Steps, engine: Engine) -> None:
    """A draining worker releases all follow-ups that have not begun, so that they can be claimed at once."""
    begun, waiting = world.follow_up(), world.follow_up()
    batch = steps.claim().leases
    steps.begin([lease for lease in batch if lease.id == begun])
    with engine.begin() as connection:
        assert leases.release_if_not_begun(connection, batch) == 1
    assert [lease.id for lease in steps.claim().leases] == [waiting]


def test_lag_of_a_delayed_result(world: World, steps: Steps) -> None:
    """Lag ends when the transport accepts the message, even if the result is settled much later."""
    follow_up = world.follow_up()
    result = attempt(steps.begun(), Sent())
    steps.settle([result._replace(answered=result.answered - 7)])
    row = world.row(follow_up)
    assert timedelta(seconds=-8) < row.accepted_at - row.finished_at < timedelta(seconds=-6)


@pytest.mark.parametrize("due", [datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)])
def test_edge_of_the_calendar(world: World, engine: Engine, due: datetime) -> None:
    """A due date that some time zone cannot represent is rejected with an explanation."""
    chat = world.chat()
    with Session(engine) as session, pytest.raises(InvalidRequestError, match="years 2 to 9998"):
        followups.schedule(session, workspace_id=world.workspace_id, chat_id=chat, message="Hello?", due_date=due)


def test_settle_of_all_kinds_together(world: World, steps: Steps, engine: Engine) -> None:
    """If the results in a batch differ, each follow-up still gets its own result."""
    chat = world.chat()
    sent, again, refused, stale, held = (world.follow_up(due=-SECOND * n) for n in range(6, 1, -1))
    first = world.follow_up(chat, -SECOND)
    begun = {one.lease.id: one for one in steps.begin(steps.claim().leases).begun}
    second = world.follow_up(chat)
    steps.begin([steps.lease()])  # the second follow-up waits for the first
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
    with engine.begin() as other:
        other.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": held})
        settling = steps.settle(batch)
    assert {one: world.row(one).status for one in outcomes} == {
        sent: "sent",
        again: "cancelled",
        refused: "failed",
        held: "pending",
        stale: "pending",
        first: "sent",
    }
    assert [lease.id for lease in settling.retry_later] == [held]
    assert (len(settling.settled), settling.stale) == (4, 1)
    assert [lease.id for lease in settling.unblocked] == [second]
    assert [len(world.failures(one)) for one in outcomes] == [1, 0, 1, 0, 0, 0]

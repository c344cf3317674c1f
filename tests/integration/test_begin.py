"""PostgreSQL tests of the begin step, which repeats all checks just before an attempt."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

import followups
from followups.scheduling import amend
from followups.store import leases

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from followups.settings import Settings
    from steps import Steps
    from world import World


class TestBegin:
    """Before an attempt begins, every check of the leased follow-up is repeated."""

    def test_once(self, world: World, steps: Steps) -> None:
        """A hint that is delivered twice begins only one attempt."""
        world.follow_up()
        lease = steps.lease()
        assert len(steps.begin([lease, lease]).begun) == 1
        assert steps.begin([lease]).begun == ()

    def test_old_token(self, world: World, steps: Steps) -> None:
        """A hint with an old token begins no attempt."""
        follow_up = world.follow_up()
        old = steps.lease()
        world.expire(follow_up)
        steps.lease()
        assert steps.begin([old]).begun == ()
        assert world.row(follow_up).begun_at is None

    def test_forged(self, world: World, steps: Steps) -> None:
        """If a hint is forged for a follow-up that is not leased or does not exist, no attempt begins."""
        follow_up = world.follow_up(due=timedelta(hours=1))
        forged = [leases.Lease(follow_up, 0, datetime.now(UTC)), leases.Lease(uuid4(), 1, datetime.now(UTC))]
        assert steps.begin(forged).begun == ()

    def test_expired_lease(self, world: World, steps: Steps) -> None:
        """If a lease expires while it is in the due queue, the follow-up does not begin."""
        follow_up = world.follow_up()
        lease = steps.lease()
        world.expire(follow_up)
        assert steps.begin([lease]).begun == ()

    def test_cancelled_in_the_queue(self, world: World, steps: Steps, engine: Engine) -> None:
        """A follow-up that is cancelled while its hint is queued never begins."""
        follow_up = world.follow_up()
        lease = steps.lease()
        with Session(engine) as session, session.begin():
            followups.cancel(session, follow_up, reason="the customer called")
        assert steps.begin([lease]).begun == ()
        assert (world.row(follow_up).status, world.row(follow_up).reason) == ("cancelled", "the customer called")

    def test_rescheduled_in_the_queue(self, world: World, steps: Steps, engine: Engine) -> None:
        """If a queued follow-up is rescheduled, its old hint has no effect."""
        follow_up = world.follow_up()
        lease = steps.lease()
        with Session(engine) as session, session.begin():
            amend(session, follow_up, {"due_date": datetime.now(UTC) + timedelta(hours=1)})
        assert steps.begin([lease]).begun == ()
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
    def test_changes_since_scheduling(
        self, world: World, steps: Steps, columns: dict[str, object], status: str, code: str
    ) -> None:
        """At begin, a follow-up ends if its user has replied, its window has closed or its chat was removed."""
        follow_up = world.follow_up(world.chat(**columns))
        beginning = steps.begin([steps.lease()])
        assert beginning.begun == ()
        assert [(one, final.status, final.reason) for one, final in beginning.ended] == [(follow_up, status, code)]
        assert (world.row(follow_up).status, world.row(follow_up).reason) == (status, code)

    def test_open_window(self, world: World, steps: Steps) -> None:
        """A messaging window allows sending within 24 hours of the user's last message."""
        world.follow_up(world.chat(channel="whatsapp", last_user_message_at=text("now() - interval '23 h 59 min'")))
        assert steps.begun().delivery.channel == "whatsapp"

    @pytest.mark.parametrize(("scheduled", "begun"), [("now() - interval '1 day'", 0), ("now()", 1)])
    def test_lateness(self, world: World, steps: Steps, scheduled: str, begun: int) -> None:
        """Lateness counts from the due date or the time of scheduling, whichever is later."""
        follow_up = world.follow_up(due=timedelta(days=-1), scheduled_at=text(scheduled))
        assert len(steps.begin([steps.lease()]).begun) == begun
        assert world.row(follow_up).reason == (None if begun else "too_late")

    def test_no_maximum_lateness(self, world: World, steps: Steps, settings: Settings) -> None:
        """If the maximum lateness is 0, no follow-up is ever too late."""
        world.follow_up(due=timedelta(days=-400), scheduled_at=text("now() - interval '400 days'"))
        patient = settings.model_copy(update={"max_lateness": timedelta(0)})
        assert steps.begun(patient).delivery.attempt == 1

    def test_open_transaction_of_a_caller(self, world: World, steps: Steps, engine: Engine) -> None:
        """If a caller's transaction locks a follow-up, begin is retried for this follow-up only."""
        held, other = world.follow_up(), world.follow_up()
        batch = steps.claim().leases
        with Session(engine) as session:
            followups.cancel(session, held, reason=None)
            beginning = steps.begin(batch)
            assert [one.lease.id for one in beginning.begun] == [other]
            assert [lease.id for lease in beginning.retry_later] == [held]
            session.rollback()
        assert [one.lease.id for one in steps.begin(beginning.retry_later).begun] == [held]

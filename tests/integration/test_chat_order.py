"""Tests of the order within a chat: a later follow-up waits for an earlier one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.orm import Session

import followups
from followups.scheduling import amend
from followups.store import chat_order
from followups.transports.port import Retry, Sent
from steps import attempt

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.settings import Settings
    from steps import Steps
    from world import World

SECOND = timedelta(seconds=1)


class TestOrder:
    """The follow-ups of a chat are sent in order."""

    def test_later_waits_and_is_unblocked(self, world: World, steps: Steps) -> None:
        """The worker that settles a chat's earlier follow-up gets the lease of the next one.

        A parked follow-up is not claimed again.
        """
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        beginning = steps.begin(steps.claim().leases)
        assert [one.lease.id for one in beginning.begun] == [first]
        assert world.row(second).waits_for == first
        assert steps.claim().leases == ()
        settling = steps.settle([attempt(beginning.begun[0], Sent())])
        assert [lease.id for lease in settling.unblocked] == [second]
        assert [one.lease.id for one in steps.begin(settling.unblocked).begun] == [second]

    def test_pile(self, world: World, steps: Steps, settings: Settings) -> None:
        """Each due follow-up of a chat is parked behind the previous one."""
        chat, seen = world.chat(), settings.model_copy(update={"max_in_flight": 3})
        ids = [world.follow_up(chat, (number - 30) * SECOND) for number in range(20)]
        ahead, elsewhere = world.follow_up(chat, timedelta(hours=1)), world.follow_up(due=-SECOND)
        beginning = steps.begin(steps.claim(seen).leases)
        assert [one.lease.id for one in beginning.begun] == ids[:1]
        assert [world.row(one).waits_for for one in ids] == [None, *ids[:-1]]
        assert world.row(ahead).waits_for is None
        assert [lease.id for lease in steps.claim().leases] == [elsewhere]
        sent: list[UUID] = []
        while beginning.begun:
            sent += [one.lease.id for one in beginning.begun]
            settling = steps.settle([attempt(one, Sent()) for one in beginning.begun])
            beginning = steps.begin(settling.unblocked)
        assert sent == ids

    def test_locked_row_of_a_pile(self, world: World, steps: Steps, engine: Engine) -> None:
        """If one follow-up of a chat is locked, the chat's other follow-ups are parked in order."""
        chat = world.chat()
        first, second, held, last = (world.follow_up(chat, (number - 9) * SECOND) for number in range(4))
        batch = steps.claim().leases[:2]
        with Session(engine) as session:
            session.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": held})
            steps.begin(batch)
        assert [world.row(one).waits_for for one in (first, second, held, last)] == [None, first, None, second]

    def test_later_waits_through_retries(self, world: World, steps: Steps) -> None:
        """If a chat's earlier follow-up will be retried, a later follow-up does not overtake it."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        beginning = steps.begin(steps.claim().leases)
        steps.settle([attempt(beginning.begun[0], Retry("HTTP 500"))])
        assert world.row(first).status == "pending"
        assert world.row(second).waits_for == first

    def test_cancel_unblocks(self, world: World, steps: Steps, engine: Engine) -> None:
        """If a chat's earlier follow-up is cancelled, the later one can be claimed."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        batch = steps.claim().leases
        steps.begin([lease for lease in batch if lease.id == second])
        assert world.row(second).waits_for == first
        with Session(engine) as session, session.begin():
            followups.cancel(session, first, reason="enough")
        assert [lease.id for lease in steps.claim().leases] == [second]

    def test_deferral_unblocks(self, world: World, steps: Steps, engine: Engine) -> None:
        """If a chat's first follow-up is rescheduled to a time after the second, the second is sent first."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        batch = steps.claim().leases
        steps.begin([lease for lease in batch if lease.id == second])
        with Session(engine) as session, session.begin():
            amend(session, first, {"due_date": datetime.now(UTC) + timedelta(hours=1)})
        assert steps.begun().lease.id == second

    def test_end_before_the_attempt_unblocks(self, world: World, steps: Steps) -> None:
        """If begin ends a follow-up without an attempt, the chat's next follow-up is leased."""
        chat = world.chat()
        long_ago = text("now() - interval '2 days'")
        world.follow_up(chat, timedelta(days=-2), scheduled_at=long_ago)
        second = world.follow_up(chat, -SECOND)
        early, late = steps.claim().leases
        steps.begin([late])
        assert [lease.id for lease in steps.begin([early]).unblocked] == [second]

    def test_many_behind_one_stuck_follow_up(self, world: World, steps: Steps) -> None:
        """If a follow-up is stuck, each later follow-up of its chat is parked once and not scanned again.

        Each follow-up waits for the one before it in the chat.
        """
        chat = world.chat()
        ids = [world.follow_up(chat, timedelta(seconds=n - 30)) for n in range(20)]
        steps.begin(steps.claim().leases)
        assert [world.row(one).waits_for for one in ids] == [None, *ids[:-1]]
        assert steps.claim().leases == ()

    def test_an_earlier_follow_up_is_rescheduled(self, world: World, steps: Steps, engine: Engine) -> None:
        """If the earlier follow-up has just been rescheduled, the later follow-up is not parked."""
        chat = world.chat()
        first, second = world.follow_up(chat, -2 * SECOND), world.follow_up(chat, -SECOND)
        lease = next(one for one in steps.claim().leases if one.id == second)
        with Session(engine) as session, session.begin():
            amend(session, first, {"due_date": datetime.now(UTC) + timedelta(hours=1)})
        with engine.begin() as connection:  # like begin, this call uses rows that were read before the change
            assert chat_order.park_if_leased(connection, [(lease, first)]) == set()


def test_lost_leases_of_an_unblocked_follow_up(world: World, steps: Steps) -> None:
    """While a follow-up is parked, its count of lost leases does not change."""
    chat = world.chat()
    earlier = world.follow_up(chat, -SECOND)
    later = world.follow_up(chat, losses=2, waits_for=earlier)
    settling = steps.settle([attempt(steps.begun(), Sent())])
    assert [(lease.id, lease.losses) for lease in settling.unblocked] == [(later, 2)]

"""Tests of claims on PostgreSQL: the choice of follow-ups, lost leases, and the low-water mark."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.delivery import dispatcher
from followups.delivery.claim import MAX_LOSSES
from followups.store import claims
from stack import wait_until
from steps import reply

if TYPE_CHECKING:
    from uuid import UUID

    import pytest
    from sqlalchemy import Engine

    from followups.delivery.hints import Hint
    from followups.settings import Settings
    from steps import Steps
    from world import World

SECOND = timedelta(seconds=1)


class TestClaim:
    """A claim leases all follow-ups that are due, and no others."""

    def test_claims_look_two_intervals_ahead(self, world: World, steps: Steps, settings: Settings) -> None:
        """A tick claims only follow-ups due within the next two tick intervals, earliest first."""
        second = world.follow_up(due=settings.tick_interval)
        first = world.follow_up(due=-SECOND)
        world.follow_up(due=settings.tick_interval * 20)
        assert [lease.id for lease in steps.claim().leases] == [first, second]

    def test_leased_is_not_claimed_again(self, world: World, steps: Steps) -> None:
        """A leased follow-up is not claimed again until its lease expires.

        Each new lease of a follow-up has a greater token than the last. An expired lease is not counted as an attempt.
        """
        follow_up = world.follow_up()
        lease = steps.lease()
        assert steps.claim().leases == ()
        world.expire(follow_up)
        assert steps.lease().token > lease.token
        row = world.row(follow_up)
        assert (row.attempts, row.losses, row.snoozes) == (0, 0, 0)

    def test_the_window_limits_follow_ups_in_flight(self, world: World, steps: Steps, settings: Settings) -> None:
        """Ticks never claim more than MAX_IN_FLIGHT follow-ups in total, but report that more are due."""
        bounded = settings.model_copy(update={"max_in_flight": 3})
        for _ in range(5):
            world.follow_up()
        first, second = steps.claim(bounded), steps.claim(bounded)
        assert (len(first.leases), first.more) == (3, True)
        assert (len(second.leases), second.more) == (0, True)

    def test_concurrent_claims_share(self, world: World, steps: Steps) -> None:
        """Of two concurrent claims, only one leases a given follow-up."""
        for _ in range(40):
            world.follow_up()
        taken: list[UUID] = []
        start = threading.Barrier(4)

        def run() -> None:
            start.wait()
            taken.extend(lease.id for lease in steps.claim().leases)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken.extend(lease.id for lease in steps.claim().leases)
        assert len(taken) == len(set(taken)) == 40

    def test_earliest_first(self, world: World, steps: Steps) -> None:
        """A claim takes the earliest due follow-ups first, regardless of when they were inserted."""
        due = [timedelta(seconds=-n) for n in (1, 5, 3)]
        ids = [world.follow_up(due=one) for one in due]
        assert [lease.id for lease in steps.claim().leases] == [ids[1], ids[2], ids[0]]

    def test_window_with_earlier_due_dates(self, world: World, steps: Steps, settings: Settings) -> None:
        """Even if follow-ups with earlier due dates are inserted, claims never exceed MAX_IN_FLIGHT."""
        bounded = settings.model_copy(update={"max_in_flight": 3})
        for group in range(1, 3):
            for _ in range(3):
                world.follow_up(due=-group * SECOND)
            steps.claim(bounded)
        assert world.scalar("SELECT count(*) FROM follow_ups WHERE lease_until > now()") == 3

    def test_locked_rows(self, world: World, steps: Steps, engine: Engine, settings: Settings) -> None:
        """A claim skips locked rows and still finds the rows after them."""
        bounded = settings.model_copy(update={"max_in_flight": 2})
        held, free = world.follow_up(due=-SECOND), world.follow_up()
        with engine.connect() as connection:
            connection.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": held})
            assert [lease.id for lease in steps.claim(bounded).leases] == [free]


class TestRecovery:
    """If a lease expires during an attempt, the outcome of the attempt is unknown."""

    def lose(self, world: World, steps: Steps, follow_up: UUID, settings: Settings | None = None) -> None:
        steps.begun(settings)
        world.expire(follow_up)

    def test_sent_again_with_deduplication(self, world: World, steps: Steps) -> None:
        """If the transport deduplicates, a lost attempt is repeated with the same attempt number.

        A lost attempt counts as a lost lease, not as a further attempt.
        """
        follow_up = world.follow_up()
        self.lose(world, steps, follow_up)
        begun = steps.begun()
        assert (begun.delivery.attempt, world.row(follow_up).losses) == (1, 1)
        assert [(number, outcome) for number, outcome, _ in world.failures(follow_up)] == [(1, "lost")]

    def test_outcome_unknown_without_deduplication(self, world: World, steps: Steps, settings: Settings) -> None:
        """If the transport cannot deduplicate, a lost attempt ends as outcome_unknown and is not retried."""
        plain = settings.model_copy(update={"transport_deduplicates": False})
        follow_up = world.follow_up()
        self.lose(world, steps, follow_up, plain)
        assert steps.claim(plain).leases == ()
        row = world.row(follow_up)
        assert (row.status, row.reason.partition(":")[0]) == ("failed", "outcome_unknown")

    def test_poison(self, world: World, steps: Steps) -> None:
        """After its third lost attempt, a follow-up is quarantined as `worker_lost`."""
        follow_up = world.follow_up()
        for _ in range(MAX_LOSSES):
            self.lose(world, steps, follow_up)
        assert steps.claim().leases == ()
        row = world.row(follow_up)
        assert (row.status, row.reason.partition(":")[0]) == ("failed", "worker_lost")

    def test_reply_meanwhile(self, world: World, steps: Steps) -> None:
        """If a reply arrives during a lost attempt, the follow-up is not sent again."""
        chat = world.chat()
        follow_up = world.follow_up(chat)
        steps.begun()
        assert reply(world, chat) == ()
        world.expire(follow_up)
        assert steps.claim().leases == ()
        row = world.row(follow_up)
        assert (row.status, row.reason.partition(":")[0]) == ("cancelled", "user_replied")


def test_lost_leases_are_counted_in_the_lease(world: World, steps: Steps) -> None:
    """A lease contains the number of the follow-up's earlier lost leases."""
    follow_up = world.follow_up()
    told = []
    for _ in range(MAX_LOSSES):
        lease = steps.lease()
        told.append(lease.losses)
        steps.begin([lease])
        world.expire(follow_up)
    assert told == [0, 1, 2]


class TestLowWater:
    """Tests of the low-water mark, before which claims read no rows."""

    def test_mark(self, world: World, steps: Steps) -> None:
        """The low-water mark is earlier than the due date of every unfinished follow-up."""
        world.follow_up(due=-timedelta(minutes=5))
        for _ in range(2):  # the follow-up is unleased in the first round and leased in the second
            low = steps.claim().low_water
            assert timedelta(minutes=5) < datetime.now(UTC) - low < timedelta(minutes=6)

    def test_nothing_is_due(self, steps: Steps) -> None:
        """If nothing is due, the low-water mark is slightly in the past, so that late commits are found."""
        low = steps.claim().low_water
        assert timedelta(0) < datetime.now(UTC) - low - claims.LOW_WATER_MARGIN < timedelta(minutes=1)

    def test_rows_inserted_before_the_mark(self, world: World, steps: Steps) -> None:
        """A claim that starts at the low-water mark misses rows inserted later with an earlier due date.

        A claim that starts at the beginning of the index finds all rows.
        """
        low = steps.claim().low_water
        world.follow_up(due=-timedelta(minutes=5))
        assert not steps.claim(since=low).leases
        assert len(steps.claim().leases) == 1

    def test_dispatcher_claims_before_the_mark(
        self, world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even if claims are slow, the next tick finds a row whose due time is before the low-water mark."""
        monkeypatch.setattr(dispatcher, "QUICK", 0.0)
        # with this share, claims from the beginning of the index are about a second apart
        monkeypatch.setattr(dispatcher, "LOOKING_SHARE", 0.005)
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

"""Tests of ticks: one dispatcher claims at a time; after a gap, workers may settle before the next claim."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url, text

from followups.delivery import claim_interval
from followups.delivery import dispatcher as ticks
from followups.delivery.attempts import Attempt
from followups.delivery.begin import begin
from followups.delivery.claim import claim, rhythm_of
from followups.delivery.dispatcher import Dispatcher
from followups.delivery.settle import settle
from followups.store import last_tick
from followups.transports.port import Retry, Sent
from followups.uptime import uptime
from stack import wait_until

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.delivery.attempts import Begun
    from followups.delivery.hints import Hint
    from followups.settings import Settings
    from followups.transports.port import Outcome
    from world import World

MINUTE = timedelta(minutes=1)
TICK_ROW = "SELECT FROM dispatcher_state FOR NO KEY UPDATE"


def pass_time(world: World, by: timedelta) -> None:
    """Move all stored times into the past, as if there had been an outage."""
    world.sql("UPDATE dispatcher_state SET last_tick_at = last_tick_at - :by, grace_until = grace_until - :by", by=by)
    world.sql("UPDATE follow_ups SET lease_until = lease_until - :by, begun_at = begun_at - :by", by=by)


def in_flight(engine: Engine, settings: Settings) -> Begun:
    """Claim and begin a single follow-up; return its attempt, the only one in flight."""
    (begun,) = begin(engine, settings, claim(engine, settings).leases).begun
    return begun


def outcome_of(begun: Begun, outcome: Outcome) -> Attempt:
    """Return the attempt with an outcome, as if the transport had returned this outcome."""
    return Attempt(begun, outcome, 0.001, uptime(), 0.0)


def send_all(world: World, published: list[float], _hint: Hint) -> None:
    """Note the time of a hint, and end all leased follow-ups as sent."""
    published.append(time.monotonic())
    world.sql("UPDATE follow_ups SET status = 'sent', finished_at = now() WHERE lease_until IS NOT NULL")


def claimed(engine: Engine, settings: Settings) -> list[UUID]:
    """Run a claim and return the ids of the leased follow-ups."""
    return [lease.id for lease in claim(engine, settings).leases]


class TestGap:
    """Tests that workers get time to record known outcomes after a gap between ticks."""

    @pytest.mark.parametrize("deduplicates", [True, False])
    def test_outcome_is_recorded(self, world: World, engine: Engine, settings: Settings, *, deduplicates: bool) -> None:
        """If the chat accepted a message before a long outage, the follow-up ends as sent."""
        settings = settings.model_copy(update={"transport_deduplicates": deduplicates})
        follow_up = world.follow_up()
        begun = in_flight(engine, settings)
        pass_time(world, settings.lease * 2)
        for _ in range(3):
            assert claimed(engine, settings) == []
        assert settle(engine, settings, [outcome_of(begun, Sent())]).stale == 0
        assert (world.row(follow_up).status, world.row(follow_up).losses) == ("sent", 0)

    def test_bounded(self, world: World, engine: Engine, settings: Settings) -> None:
        """After a gap between ticks, a worker that settles nothing in the grace period loses its leases."""
        follow_up = world.follow_up()
        in_flight(engine, settings)
        pass_time(world, settings.lease * 2)
        assert claimed(engine, settings) == []
        grace = rhythm_of(settings).grace
        world.sql("UPDATE dispatcher_state SET grace_until = grace_until - :by", by=grace)
        assert claimed(engine, settings) == [follow_up]
        assert world.row(follow_up).losses == 1

    def test_ticks_continued(self, world: World, engine: Engine, settings: Settings) -> None:
        """If ticks have not stopped, a lease that expires in flight is taken over immediately."""
        follow_up = world.follow_up()
        in_flight(engine, settings)
        world.expire(follow_up)
        assert claimed(engine, settings) == [follow_up]

    def test_not_begun(self, world: World, engine: Engine, settings: Settings) -> None:
        """After a gap, the first tick claims follow-ups that were leased but have not begun.

        For a follow-up that has not begun, the worker has no outcome to record.
        """
        follow_up = world.follow_up()
        assert claimed(engine, settings) == [follow_up]
        pass_time(world, settings.lease * 2)
        assert claimed(engine, settings) == [follow_up]

    def test_in_flight_counts(self, world: World, engine: Engine, settings: Settings) -> None:
        """During the grace period, attempts with expired leases still count as in flight."""
        one = settings.model_copy(update={"max_in_flight": 1})
        world.follow_up(due=-MINUTE)
        in_flight(engine, one)
        world.follow_up()
        pass_time(world, settings.lease * 2)
        assert claimed(engine, one) == []

    def test_clock_set_back(self, world: World, engine: Engine, settings: Settings) -> None:
        """If the database's clock is set back, ticks are still recorded, and the old grace period ends."""
        follow_up = world.follow_up()
        in_flight(engine, settings)
        pass_time(world, -timedelta(hours=1))
        world.sql("UPDATE dispatcher_state SET grace_until = now() + interval '1 hour'")
        world.expire(follow_up)
        assert claimed(engine, settings) == [follow_up]
        assert world.scalar("SELECT last_tick_at <= now() FROM dispatcher_state")

    @pytest.mark.parametrize(("gap", "over"), [(timedelta(seconds=2), True), (MINUTE, False)])
    def test_gap_within_a_grace(
        self, world: World, engine: Engine, settings: Settings, gap: timedelta, *, over: bool
    ) -> None:
        """Late ticks do not extend a grace period; only another outage starts a new one."""
        follow_up = world.follow_up()
        in_flight(engine, settings)
        world.expire(follow_up)
        world.sql(
            "UPDATE dispatcher_state SET last_tick_at = now() - :gap, grace_until = now() - :gap + interval '1 s'",
            gap=gap,
        )
        assert claimed(engine, settings) == [follow_up] * over

    def test_rare_ticks(self, world: World, engine: Engine, settings: Settings) -> None:
        """If the tick interval is longer than a lease, the dispatcher claims again after the grace period."""
        rare = settings.model_copy(update={"tick_interval": timedelta(minutes=5)})
        follow_up = world.follow_up()
        in_flight(engine, rare)
        pass_time(world, timedelta(minutes=4))
        hints: list[Hint] = []
        dispatcher = Dispatcher(rare, engine, hints.append)
        dispatcher.start()
        dispatcher.tick()
        wait_until(lambda: world.scalar("SELECT grace_until IS NOT NULL FROM dispatcher_state"))
        world.sql("UPDATE dispatcher_state SET grace_until = now()")
        wait_until(lambda: hints)
        dispatcher.stop()
        assert [entry[0] for hint in hints for entry in hint.entries] == [str(follow_up)]


@pytest.mark.parametrize(
    ("changed", "gap", "grace"),
    [
        ({}, 3, 13),
        ({"lease": MINUTE * 59, "tick_interval": MINUTE * 5}, 601, 13),
        ({"tick_interval": MINUTE * 5}, 30, 13),
        ({"transport_timeout": timedelta(seconds=1)}, 3, 7),
    ],
)
def test_length_of_a_gap(settings: Settings, changed: dict[str, timedelta], gap: float, grace: float) -> None:
    """A gap between ticks is long if it exceeds half a lease, or two tick intervals plus a second.

    The grace period is as long as the longest call or connection attempt.
    """
    defaults = {"lease": MINUTE, "tick_interval": timedelta(seconds=1), "transport_timeout": timedelta(seconds=10)}
    rhythm = rhythm_of(settings.model_copy(update=defaults | changed))
    assert (rhythm.longest_gap, rhythm.grace) == (timedelta(seconds=gap), timedelta(seconds=grace))


def test_a_slow_connection(settings: Settings) -> None:
    """The grace period is at least as long as the connect timeout in the database URL."""
    url = make_url(settings.database_url.get_secret_value()).update_query_dict({"connect_timeout": "60"})
    slow = SecretStr(url.render_as_string(hide_password=False))
    assert rhythm_of(settings.model_copy(update={"database_url": slow})).grace > MINUTE


class TestOneAtATime:
    """Tests that only one dispatcher claims at a time."""

    def test_window_of_several_dispatchers(self, world: World, engine: Engine, settings: Settings) -> None:
        """Even if dispatchers claim concurrently, at most MAX_IN_FLIGHT follow-ups are in flight."""
        bounded = settings.model_copy(update={"max_in_flight": 100})
        world.burst([-MINUTE] * 300)
        for round_ in range(5):
            start = threading.Barrier(4)

            def dispatcher(start: threading.Barrier = start) -> None:
                start.wait()
                for _ in range(3):
                    claim(engine, bounded)

            threads = [threading.Thread(target=dispatcher) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert world.scalar("SELECT count(*) FROM follow_ups WHERE lease_until > now()") == 100, round_
            world.sql("UPDATE follow_ups SET lease_until = NULL")

    def test_busy(self, world: World, engine: Engine, settings: Settings) -> None:
        """While another dispatcher claims, a claim returns immediately as busy and reads no follow-ups."""
        follow_up = world.follow_up()
        with engine.begin() as another:
            another.execute(text(TICK_ROW))
            busy = claim(engine, settings)
        assert (busy.busy, busy.leases) == (True, ())
        assert claimed(engine, settings) == [follow_up]

    def test_no_claim_after_the_tick(
        self, world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After its tick, a dispatcher stops claiming, because another one may run the next tick."""
        monkeypatch.setattr(claim_interval, "SHORTEST", 0.4)
        short = settings.model_copy(update={"tick_interval": timedelta(seconds=0.2), "max_in_flight": 10})
        world.burst([timedelta(0)] * 30)
        hints: list[Hint] = []
        dispatcher = Dispatcher(short, engine, hints.append)
        dispatcher.start()
        dispatcher.tick()
        wait_until(lambda: hints)
        world.sql("UPDATE follow_ups SET status = 'sent', finished_at = now() WHERE lease_until IS NOT NULL")
        time.sleep(0.6)
        claims_of_first_tick = len(hints)
        dispatcher.tick()
        wait_until(lambda: len(hints) > claims_of_first_tick)
        dispatcher.stop()
        assert claims_of_first_tick == 1

    def test_a_tick_during_a_tick(self, world: World, engine: Engine, settings: Settings) -> None:
        """A tick ends one interval after its request, even if an earlier tick was still running then."""
        small = settings.model_copy(update={"tick_interval": timedelta(seconds=1), "max_in_flight": 10})
        world.burst([-MINUTE] * 1000)
        published: list[float] = []
        dispatcher = Dispatcher(small, engine, partial(send_all, world, published))
        dispatcher.start()
        dispatcher.tick()
        wait_until(lambda: published)
        dispatcher.tick()
        requested = time.monotonic()
        time.sleep(2.2)
        dispatcher.stop()
        assert 0.5 < published[-1] - requested < 1.6

    def test_the_rest_of_a_backlog(
        self, world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A slow claim of a backlog is followed by another without a low-water mark, but only within a tick."""
        monkeypatch.setattr(ticks, "QUICK", 0.0)
        monkeypatch.setattr(ticks, "LOOKING_SHARE", 0.01)
        short = settings.model_copy(update={"tick_interval": timedelta(seconds=0.2), "max_in_flight": 10})
        world.burst([-MINUTE] * 1000)
        published: list[float] = []
        dispatcher = Dispatcher(short, engine, partial(send_all, world, published))
        dispatcher.start()
        dispatcher.tick()
        wait_until(lambda: published)
        time.sleep(0.4)
        claims_of_the_tick = len(published)
        time.sleep(1.5)
        dispatcher.stop()
        assert len(published) == claims_of_the_tick

    def test_waits_and_claims_without_another_tick(self, world: World, engine: Engine, settings: Settings) -> None:
        """If another dispatcher is claiming, a dispatcher waits and then claims without a new tick."""
        rare = settings.model_copy(update={"tick_interval": MINUTE})
        world.follow_up()
        hints: list[Hint] = []
        dispatcher = Dispatcher(rare, engine, hints.append)
        with engine.begin() as another:
            another.execute(text(TICK_ROW))
            dispatcher.start()
            dispatcher.tick()
            time.sleep(0.05)
            assert not hints
        wait_until(lambda: hints)
        dispatcher.stop()

    def test_frozen(self, world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        """If a dispatcher freezes during a claim, PostgreSQL ends its session, so that others can claim."""
        monkeypatch.setattr(last_tick, "FROZEN_AFTER", "1s")
        follow_up = world.follow_up()
        with engine.connect() as frozen:
            assert last_tick.begin(frozen, rhythm_of(settings))
            assert claim(engine, settings).busy
            wait_until(lambda: claimed(engine, settings) == [follow_up])
            frozen.invalidate()

    def test_row_deleted(self, world: World, engine: Engine, settings: Settings) -> None:
        """If an operator deletes the row that records the ticks, ticks continue."""
        world.follow_up()
        world.sql("DELETE FROM dispatcher_state")
        hints: list[Hint] = []
        dispatcher = Dispatcher(settings, engine, hints.append)
        dispatcher.start()
        dispatcher.tick()
        wait_until(lambda: hints)
        dispatcher.stop()


class TestToken:
    """Tests that no lease token is used twice, even if the database loses a commit."""

    def test_claim_lost_in_a_failover(self, world: World, engine: Engine, settings: Settings) -> None:
        """If a failover loses a claim, the late result of its attempt does not settle the next attempt."""
        follow_up = world.follow_up()
        before = in_flight(engine, settings)
        world.sql("UPDATE follow_ups SET lease_token = 0, lease_until = NULL, begun_at = NULL, attempts = 0")
        after = in_flight(engine, settings)
        assert settle(engine, settings, [outcome_of(before, Retry("refused"))]).stale == 1
        assert world.row(follow_up).begun_at is not None
        assert settle(engine, settings, [outcome_of(after, Sent())]).stale == 0
        assert world.row(follow_up).status == "sent"

    def test_unblocked_lease_lost_in_a_failover(self, world: World, engine: Engine, settings: Settings) -> None:
        """If a failover loses an unblocked follow-up's lease, the next lease has a greater token."""
        chat = world.chat()
        earlier = world.follow_up(chat, -MINUTE)
        later = world.follow_up(chat, waits_for=earlier)
        begun = in_flight(engine, settings)
        (unblocked,) = settle(engine, settings, [outcome_of(begun, Sent())]).unblocked
        world.sql("UPDATE follow_ups SET lease_token = 0, lease_until = NULL WHERE id = :id", id=later)
        (again,) = claim(engine, settings).leases
        assert again.id == unblocked.id == later
        assert again.token > unblocked.token

    def test_exact_in_json(self, world: World, engine: Engine, settings: Settings) -> None:
        """A fencing token is exact as a JSON number, and greater than all earlier tokens."""
        ahead = 2**53 - 3
        world.follow_up()
        tokens = {claim(engine, settings).leases[0].token}
        world.follow_up(lease_token=ahead)
        tokens |= {claim(engine, settings).leases[0].token}
        low, high = sorted(tokens)
        assert 10**15 < low < 2**53
        assert high == ahead + 1

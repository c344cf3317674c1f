"""The circuit breaker: its state in a real Valkey, and pipelines whose transport fails."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import redis

from followups.database import make_async_engine
from followups.delivery import deferral
from followups.delivery.claim import claim
from followups.delivery.pipeline import Pipeline
from followups.flow_control import breaker
from followups.flow_control.breaker import (
    CLOSED,
    Breaker,
    BreakerStore,
    OutcomeReport,
    RecoveryPolicy,
    SharedState,
    WorkspaceOutcomes,
    read,
)
from followups.session_settings import ONCE_PLANNED
from followups.telemetry import metrics
from followups.transports.port import Rejected, Retry, Sent, Snoozed, Unknown
from server_clock import ServerClock
from stack import wait_until
from world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.settings import Settings
    from followups.transports.port import Delivery, Outcome

FAILURES = 5
KEY, OTHER = 1, 2
"""The keys of two workspaces."""
QUICK = RecoveryPolicy(
    first_pause=0.05, longest_pause=0.2, probes=2, first_rate=20, last_rate=200, failures_to_reopen=3
)
PENDING = "SELECT count(*) FROM follow_ups WHERE status = 'pending'"


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return settings with broker keys that only this test uses."""
    return settings.model_copy(update={"breaker_failures": FAILURES, "broker_prefix": f"test-{uuid4().hex}:"})


def ids(count: int) -> list[UUID]:
    """Return the given number of follow-up ids."""
    return [uuid4() for _ in range(count)]


def run(own: Settings, script: Callable[[BreakerStore], Awaitable[None]], policy: RecoveryPolicy = QUICK) -> None:
    """Run the test's script with the breaker's store, then close the store."""

    async def main() -> None:
        store = BreakerStore(own, "http", policy)
        try:
            await script(store)
        finally:
            await store.close()

    asyncio.run(main())


async def report(
    store: BreakerStore, failed: list[UUID], wanted: int, *, succeeded: bool, key: int = KEY
) -> SharedState:
    """Report outcomes of one workspace and return the breaker's state.

    The function itself checks the tripped workspaces, and omits them from the returned state.
    """
    runs = (WorkspaceOutcomes(key, len(failed), after_success=succeeded),) if failed or succeeded else ()
    reading = await store.report(OutcomeReport(tuple(failed), succeeded, runs), wanted)
    assert reading.state != CLOSED or not reading.tripped
    return replace(reading, tripped=frozenset())


async def opened(store: BreakerStore) -> None:
    """Report failures to the breaker until it opens."""
    assert await report(store, ids(FAILURES), 10, succeeded=False) == SharedState("open", 0, changed=True)


def test_opens_for_many_in_a_row(own: Settings) -> None:
    """Consecutive failures of different follow-ups open the breaker, even across workers.

    Repeated failures of a single follow-up do not open the breaker.
    """

    async def script(store: BreakerStore) -> None:
        (one,) = ids(1)
        for _ in range(FAILURES * 2):
            assert (await report(store, [one], 0, succeeded=False)).state == CLOSED
        assert (await report(store, ids(FAILURES - 2), 0, succeeded=False)).state == CLOSED
        # a success resets the count of consecutive failures
        assert (await report(store, ids(1), 0, succeeded=True)).state == CLOSED
        assert (await report(store, ids(FAILURES - 2), 0, succeeded=False)).state == CLOSED
        other = BreakerStore(own, "http", QUICK)
        assert await report(other, ids(1), 7, succeeded=False) == SharedState("open", 0, changed=True)
        await other.close()
        assert await report(store, [], 7, succeeded=False) == SharedState("open")

    run(own, script)


def test_probes_then_recovers(own: Settings) -> None:
    """After a pause, an open breaker permits a few probes.

    A failed probe lengthens the next pause; after a successful probe, the breaker starts to recover.
    """

    async def script(store: BreakerStore) -> None:
        await opened(store)
        await asyncio.sleep(0.06)
        assert await report(store, [], 0, succeeded=False) == SharedState("open")  # no follow-up is waiting
        assert await report(store, [], 10, succeeded=False) == SharedState("probing", 2, changed=True)
        assert await report(store, [], 10, succeeded=False) == SharedState("probing")
        assert await report(store, ids(1), 10, succeeded=False) == SharedState("open", 0, changed=True)
        await asyncio.sleep(0.06)
        assert await report(store, [], 10, succeeded=False) == SharedState("open")
        await asyncio.sleep(0.06)
        assert await report(store, [], 10, succeeded=False) == SharedState("probing", 2, changed=True)
        assert await report(store, [], 10, succeeded=True) == SharedState("recovering", 0, changed=True)

    run(own, script)


def test_recovers_at_a_growing_rate(own: Settings) -> None:
    """A recovering breaker permits attempts at a growing rate until all attempts are permitted."""

    async def script(store: BreakerStore) -> None:
        await opened(store)
        await report(store, [], 0, succeeded=True)
        started, granted, reading = time.monotonic(), 0, SharedState("recovering")
        while reading.state == "recovering":
            reading = await report(store, [], 1000, succeeded=False)
            granted += reading.permits
            elapsed = time.monotonic() - started
            # The breaker doubles its rate every second, so attempts at most double each second.
            assert granted <= 20 * 2 ** (elapsed + 1) / 0.69
            await asyncio.sleep(0.02)
        assert reading == SharedState(CLOSED, 0, changed=True)
        assert granted > 10
        assert read(client(own), own).state == CLOSED

    run(own, script)


def test_fails_again(own: Settings) -> None:
    """A recovering breaker needs fewer consecutive failures to open than a closed breaker."""

    async def script(store: BreakerStore) -> None:
        await opened(store)
        await report(store, [], 0, succeeded=True)
        assert (await report(store, ids(2), 10, succeeded=False)).state == "recovering"
        assert (await report(store, ids(1), 10, succeeded=False)).state == "open"
        shown = read(client(own), own)
        assert shown.state == "open"
        assert shown.probed == 1

    run(own, script)


def test_probes_that_never_end(own: Settings) -> None:
    """If a worker crashes without reporting its probes, other workers can still send probes."""

    async def script(store: BreakerStore) -> None:
        await opened(store)
        await asyncio.sleep(0.06)
        assert (await report(store, [], 10, succeeded=False)).permits == 2
        await asyncio.sleep(0.25)
        assert (await report(store, [], 10, succeeded=False)).permits == 2

    run(own, script)


async def tripped(store: BreakerStore) -> frozenset[int]:
    """Return the keys of the workspaces that the breaker has tripped."""
    return (await store.report(OutcomeReport(), 0)).tripped


def test_which_workspaces_are_tripped(own: Settings) -> None:
    """The breaker holds the workspaces whose last attempts failed.

    When the breaker opens again, it no longer holds workspaces that had a success in the meantime.
    """

    async def script(store: BreakerStore) -> None:
        await report(store, ids(FAILURES - 1), 0, succeeded=False, key=OTHER)
        await report(store, ids(1), 0, succeeded=True)
        await report(store, ids(1), 0, succeeded=False, key=OTHER)
        await report(store, ids(FAILURES), 0, succeeded=False)
        assert await tripped(store) == {KEY, OTHER}
        assert (
            await store.report(OutcomeReport(runs=(WorkspaceOutcomes(3, FAILURES, after_success=False),)), 0)
        ).tripped == {
            KEY,
            OTHER,
            3,
        }
        await report(store, [], 0, succeeded=True, key=OTHER)
        # a held workspace recovers gradually, so it stays tripped after a success
        assert await tripped(store) == {KEY, OTHER, 3}
        await report(store, ids(FAILURES), 0, succeeded=False)
        assert await store.report(OutcomeReport(), 0) == SharedState("open", tripped=frozenset({KEY, 3}))

    run(own, script)


def test_few_in_a_row_trip_no_workspace(own: Settings) -> None:
    """The breaker holds a workspace after five successive failures; any success restarts the count.

    An open breaker counts failures in the same way as a closed one.
    """

    async def script(store: BreakerStore) -> None:
        (one,) = ids(1)
        for _ in range(FAILURES - 1):
            await report(store, [one], 0, succeeded=False, key=OTHER)
        await report(store, ids(FAILURES), 0, succeeded=False)
        assert await tripped(store) == {KEY}
        for after_success in (True, False, False, False):
            assert (
                await store.report(OutcomeReport(runs=(WorkspaceOutcomes(OTHER, 1, after_success=after_success),)), 0)
            ).tripped == {KEY}
        assert (
            await store.report(OutcomeReport(runs=(WorkspaceOutcomes(OTHER, 1, after_success=False),)), 0)
        ).tripped == {
            KEY,
            OTHER,
        }

    run(own, script)


def test_few_attempts_trip_earlier(own: Settings) -> None:
    """If the settings allow few attempts, fewer failures in a row trip a workspace."""

    async def script(store: BreakerStore) -> None:
        await report(store, ids(FAILURES), 0, succeeded=False)
        assert (
            await store.report(OutcomeReport(runs=(WorkspaceOutcomes(OTHER, 2, after_success=False),)), 0)
        ).tripped == {
            KEY,
            OTHER,
        }

    run(own.model_copy(update={"max_attempts": 3}), script)


def test_without_a_held_workspace_the_breaker_closes(own: Settings) -> None:
    """If the breaker holds back no workspace, it closes instead of waiting for a success."""

    async def script(store: BreakerStore) -> None:
        for key, one in enumerate(ids(FAILURES * 2)):
            assert (await report(store, [one], 0, succeeded=False, key=key)).state == CLOSED
        await report(store, [], 0, succeeded=True, key=3)
        await opened(store)
        await asyncio.sleep(0.06)
        assert (await report(store, [], 10, succeeded=False)).state == "probing"
        assert (
            await store.report(OutcomeReport(runs=(WorkspaceOutcomes(KEY, 0, after_success=True),)), 0)
        ).state == "probing"
        assert (await store.report(OutcomeReport(failed=tuple(ids(1))), 10)) == SharedState(CLOSED, changed=True)

    run(own, script)


@pytest.fixture
def clock(own: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerClock]:
    """Return the Redis server's clock, which the test can set."""
    clock = ServerClock(own.broker_url.get_secret_value(), monkeypatch, breaker)
    yield clock
    clock.close()


DAY = 86_400.0


@pytest.mark.parametrize("step", [-DAY, -60.0, 60.0, DAY])
def test_the_clock_is_set_while_open(own: Settings, clock: ServerClock, step: float) -> None:
    """If Redis's clock is changed, the next probe still begins within the longest pause."""

    async def script(store: BreakerStore) -> None:
        await opened(store)
        clock.go_on(step)
        waited = 0.0
        while not (reading := await report(store, [], 10, succeeded=False)).permits:
            clock.go_on(0.01)
            waited += 0.01
            assert waited <= QUICK.longest_pause
        assert reading == SharedState("probing", 2, changed=True)
        clock.go_on(step)
        clock.go_on(QUICK.longest_pause)
        await report(store, [], 10, succeeded=False)
        clock.go_on(QUICK.longest_pause)
        # the outcomes of the first probes were never reported
        assert (await report(store, [], 10, succeeded=False)).permits == 2

    run(own, script)


@pytest.mark.parametrize("step", [-DAY, -1.0, 1.0, DAY])
def test_the_clock_is_set_while_recovering(own: Settings, clock: ServerClock, step: float) -> None:
    """A change of Redis's clock does not change the length of the breaker's recovery."""
    policy = replace(QUICK, first_rate=10, last_rate=10_000)

    async def script(store: BreakerStore) -> None:
        await opened(store)
        await report(store, [], 0, succeeded=True)
        clock.go_on(1)
        await report(store, [], 1000, succeeded=False)
        clock.go_on(step)
        granted = (await report(store, [], 1000, succeeded=False)).permits
        assert granted <= 10 * 2**3
        seconds = 0
        while seconds <= 10 and (await report(store, [], 1000, succeeded=False)).state != CLOSED:
            clock.go_on(1)
            seconds += 1
        assert 6 <= seconds <= 10

    run(own, script, policy)


def client(own: Settings) -> redis.Redis:
    """Return a Redis client connected to the broker."""
    return redis.Redis.from_url(own.broker_url.get_secret_value())


class FixedStore:
    """A store whose shared state only the test changes."""

    def __init__(self, shared: SharedState) -> None:
        self.shared = shared

    async def report(self, outcomes: OutcomeReport, wanted: int) -> SharedState:
        del outcomes, wanted
        return self.shared

    async def close(self) -> None: ...


def knowing(shared: SharedState) -> AbstractAsyncContextManager[Breaker]:
    """Run a worker's breaker that has read the given shared state."""
    return reading(FixedStore(shared))


@asynccontextmanager
async def reading(store: Any) -> AsyncIterator[Breaker]:
    """Run a worker's breaker that has read the store's shared state."""
    door = Breaker(store, "http", FAILURES)
    report = asyncio.Event()
    informing = asyncio.create_task(door.run(lambda: 0, report.set))
    await report.wait()
    try:
        yield door
    finally:
        informing.cancel()
        await asyncio.wait([informing])


async def test_attempts_in_flight_use_no_permits() -> None:
    """Attempts in flight when the breaker opens do not use up the permits for probes."""
    async with knowing(SharedState("open", tripped=frozenset({KEY}))) as door:
        door.spend([KEY] * 200)
        assert door.permits == 0
        assert door.tripped == {KEY}


async def test_begun_follow_ups_use_up_permits() -> None:
    """Each begun follow-up of a tripped workspace uses up one permit; those of other workspaces use up none."""
    async with knowing(SharedState("probing", permits=3, tripped=frozenset({KEY}))) as door:
        assert door.permits == 3
        door.spend([KEY, OTHER, KEY])
        assert door.permits == 1


FAILED = Retry("no connection")


async def test_a_worker_trips_workspaces_by_itself() -> None:
    """Until the next report, a worker itself trips the workspaces of its last failures, if enough follow in a row."""
    async with knowing(SharedState(CLOSED)) as door:
        for _ in range(2):
            for one in ids(FAILURES - 1):
                door.record(one, KEY, FAILED)
            assert door.tripped == frozenset()
            door.record(*ids(1), OTHER, Sent())
        for one in ids(FAILURES):
            door.record(one, KEY, FAILED)
        assert door.tripped == {KEY}


@dataclass
class Reporting:
    """A worker's breaker that reports to Valkey."""

    breaker: Breaker
    reports: int = 0

    def fail(self, key: int, count: int, each: int = 1) -> None:
        """Record failed attempts of different follow-ups of one workspace; ``each`` of them fails so often."""
        for one in ids(count) * each:
            self.breaker.record(one, key, FAILED)

    def succeed(self, key: int) -> None:
        """Record a successful attempt of a workspace."""
        self.breaker.record(*ids(1), key, Sent())

    async def reported(self, times: int) -> None:
        """Wait for the given number of further reports."""
        until = self.reports + times
        while self.reports < until:  # noqa: ASYNC110 - the number has no event
            await asyncio.sleep(0.005)


@asynccontextmanager
async def reporting(own: Settings, wanted: int = 0) -> AsyncIterator[Reporting]:
    """Run a worker's breaker, from its first report on; ``wanted`` follow-ups wait for the breaker."""
    worker = Reporting(Breaker(BreakerStore(own, "http", QUICK), "http", FAILURES))

    def count() -> None:
        worker.reports += 1

    running = asyncio.create_task(worker.breaker.run(lambda: wanted, count))
    try:
        async with asyncio.timeout(10):
            await worker.reported(1)
            yield worker
    finally:
        while not running.done():  # a query to Redis may ignore a cancellation, because Python 3.11's `wait_for` does
            running.cancel()
            await asyncio.wait([running], timeout=0.1)


async def test_important_outcomes_are_reported_at_once(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outcomes that may open the breaker are reported at once, as is every outcome while the breaker is not closed.

    A metric counts how often the breaker has opened.
    """
    monkeypatch.setattr(breaker, "READ_INTERVAL", 60)
    opened = metrics.BREAKER_OPENED.labels(transport="http")._value  # noqa: SLF001 - the client has no public access
    before = opened.get()
    async with reporting(own) as worker:
        await asyncio.sleep(0.2)
        assert worker.reports == 1
        worker.fail(KEY, FAILURES)
        await worker.reported(1)
        assert read(client(own), own).state == "open"
        worker.succeed(KEY)
        await worker.reported(1)
        assert read(client(own), own).state == "recovering"
        await asyncio.sleep(0.1)
        assert worker.reports == 3
    assert opened.get() - before == 1


async def test_each_failure_is_reported_once(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed follow-up counts once for its workspace, and no longer after another worker's success."""
    monkeypatch.setattr(breaker, "READ_INTERVAL", 0.02)
    other = BreakerStore(own, "http", QUICK)
    async with reporting(own) as worker:
        worker.fail(KEY, FAILURES - 2)
        worker.fail(OTHER, 1, each=FAILURES)
        await worker.reported(3)
        await report(other, [], 0, succeeded=True, key=3)
        await worker.reported(3)
        assert (await report(other, ids(1), 0, succeeded=False, key=3)).state == CLOSED
        assert (await report(other, ids(FAILURES - 1), 0, succeeded=False, key=3)).state == "open"
        assert await tripped(other) == {OTHER, 3}
    await other.close()


async def test_failures_before_a_success_do_not_count(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a worker had a success between failures, only the failures after the success count.

    It makes no difference which of them are in the same report.
    """
    monkeypatch.setattr(breaker, "READ_INTERVAL", 0.05)
    async with reporting(own) as worker:
        worker.fail(OTHER, 1, each=FAILURES)
        worker.fail(KEY, FAILURES - 1)
        worker.succeed(KEY)
        worker.fail(KEY, FAILURES - 1)
        await worker.reported(2)
        assert read(client(own), own).state == CLOSED
        worker.succeed(KEY)
        worker.fail(KEY, 1)
        worker.fail(OTHER, FAILURES)
        await worker.reported(2)
        found = read(client(own), own)
        assert (found.state, found.tripped) == ("open", {OTHER})


async def test_a_worker_asks_for_no_more_permits_than_it_needs(own: Settings) -> None:
    """While the breaker recovers, unused permits of a worker do not add up beyond its waiting follow-ups."""
    async with reporting(own, wanted=2) as worker:
        worker.fail(KEY, FAILURES)
        await worker.reported(1)
        worker.succeed(KEY)
        await worker.reported(6)
        assert worker.breaker.is_recovering
        assert worker.breaker.permits == 2


async def test_an_unreachable_redis_is_asked_seldom(own: Settings) -> None:
    """After a failure, a worker does not query Redis for some seconds."""
    nobody = type(own.broker_url)("redis://127.0.0.1:1/0")
    async with reporting(own.model_copy(update={"broker_url": nobody})) as worker:
        await asyncio.sleep(0.2)
        assert worker.reports == 1


REFUSED = Rejected("HTTP 401 unknown key", 401)
REFUSED_DELAY = timedelta(seconds=0.3)
DEFERRED = Snoozed("HTTP 401 unknown key", REFUSED_DELAY, 401)


@pytest.fixture(autouse=True)
def refused_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let refused follow-ups, and deferred ones, wait for less than a second instead of minutes."""
    monkeypatch.setattr(breaker, "REFUSED_DELAY", REFUSED_DELAY)
    monkeypatch.setattr(deferral, "LONGEST_DEFERRAL", REFUSED_DELAY)
    monkeypatch.setattr(deferral, "SOONEST", REFUSED_DELAY / 2)


@pytest.mark.parametrize(
    ("shared", "settled"),
    [
        (SharedState(CLOSED), REFUSED),
        (SharedState("open", tripped=frozenset({OTHER})), REFUSED),
        *((SharedState(state, tripped=frozenset({KEY})), DEFERRED) for state in ("open", "probing", "recovering")),
    ],
)
async def test_a_refusal_is_final_unless_its_workspace_is_tripped(shared: SharedState, settled: Outcome) -> None:
    """A single message that is refused fails at once, unless the breaker has tripped its workspace.

    A message that the receiver rejects for any other reason fails at once in every state.
    """
    other = Rejected("HTTP 404", 404)
    async with knowing(shared) as door:
        (one,) = ids(1)
        assert door.record(one, KEY, REFUSED) == settled
        assert door.record(one, KEY, other) is other


async def test_a_refusal_is_final_if_messages_are_accepted() -> None:
    """After enough failures in a row, refused follow-ups are deferred until a message is accepted."""
    async with knowing(SharedState(CLOSED)) as door:
        for _ in range(3):
            refused = [door.record(one, KEY, REFUSED) for one in ids(FAILURES + 1)]
            assert refused == [REFUSED] * (FAILURES - 1) + [DEFERRED] * 2
            assert door.record(*ids(1), KEY, Sent()) == Sent()


async def test_refusals_in_a_row_of_one_workspace_and_of_all() -> None:
    """Refused follow-ups are deferred if all messages of their workspace are refused, or those of all workspaces."""
    async with knowing(SharedState(CLOSED)) as door:
        refused = []
        for one in ids(FAILURES):
            refused.append(door.record(one, KEY, REFUSED))
            assert door.record(*ids(1), OTHER, Sent()) == Sent()
        assert refused == [REFUSED] * (FAILURES - 1) + [DEFERRED]
    async with knowing(SharedState(CLOSED)) as door:
        settled = [door.record(one, number, REFUSED) for number, one in enumerate(ids(FAILURES))]
        assert settled == [REFUSED] * (FAILURES - 1) + [DEFERRED]


async def test_other_failures_say_nothing_about_the_secret() -> None:
    """A workspace's outage neither defers refused follow-ups of another, nor resets the count of refusals."""
    outage = Retry("HTTP 500", status_code=500)
    async with knowing(SharedState("open", tripped=frozenset({OTHER}))) as door:
        for one in ids(2 * FAILURES):
            door.record(one, OTHER, outage)
        assert door.record(*ids(1), KEY, REFUSED) == REFUSED
    async with knowing(SharedState(CLOSED)) as door:
        refused = []
        for one in ids(FAILURES):
            door.record(*ids(1), KEY, outage)
            refused.append(door.record(one, KEY, REFUSED))
        assert refused == [REFUSED] * (FAILURES - 1) + [DEFERRED]


async def test_slow_reads_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """If reading the shared state takes long, as with many tripped workspaces, the state is read less often."""
    monkeypatch.setattr(breaker, "READ_INTERVAL", 0.01)

    class SlowStore(FixedStore):
        reads = 0

        async def report(self, *given: Any) -> SharedState:
            self.reads += 1
            await asyncio.sleep(0.05)
            return await super().report(*given)

    store = SlowStore(SharedState(CLOSED))
    async with reading(store):
        await asyncio.sleep(1)
    assert store.reads <= 3
    monkeypatch.setattr(breaker, "LONGEST_READ_PAUSE", 0.05)
    store = SlowStore(SharedState(CLOSED))
    async with reading(store), asyncio.timeout(10):
        while store.reads <= 3:  # noqa: ASYNC110 - the store has no event for it
            await asyncio.sleep(0.01)


async def test_a_refusal_is_final_once_its_workspace_is_accepted_again() -> None:
    """During the recovery, a workspace's refused messages fail, if others of the workspace were accepted.

    They do not count as failures of the transport, unless too many follow in a row.
    """
    async with knowing(SharedState("recovering", tripped=frozenset({KEY}))) as door:
        assert door.record(*ids(1), KEY, REFUSED) == DEFERRED
        assert door.record(*ids(1), KEY, Sent()) == Sent()
        refused = [door.record(one, KEY, REFUSED) for one in ids(FAILURES)]
        assert refused == [REFUSED] * (FAILURES - 1) + [DEFERRED]


async def test_a_refusal_is_deferred_again_once_the_breaker_is_open_again() -> None:
    """A message that was accepted before the breaker opened again does not make refusals final."""
    store = FixedStore(SharedState("recovering", tripped=frozenset({KEY})))
    async with reading(store) as door:
        assert door.record(*ids(1), KEY, Sent()) == Sent()
        store.shared = SharedState("open", tripped=frozenset({KEY}))
        async with asyncio.timeout(5):
            while door.is_recovering:  # noqa: ASYNC110 - the breaker has no event for it
                await asyncio.sleep(0.01)
        assert door.record(*ids(1), KEY, REFUSED) == DEFERRED


async def test_one_refusal_is_final_however_few_failures_open_the_breaker() -> None:
    """A single message that is refused among accepted ones fails, even if one failure opens the breaker."""
    store: Any = FixedStore(SharedState(CLOSED))
    door = Breaker(store, "http", failures=1)
    for _ in range(3):
        assert door.record(*ids(1), KEY, REFUSED) == REFUSED
        assert door.record(*ids(1), KEY, Sent()) == Sent()


def test_a_refusal_is_final_without_a_breaker() -> None:
    """If the breaker is disabled, every refused follow-up fails."""
    store: Any = FixedStore(SharedState(CLOSED))
    door = Breaker(store, "http", failures=0)
    assert {door.record(one, KEY, REFUSED) for one in ids(FAILURES * 2)} == {REFUSED}


class FailingTransport:
    """A transport that fails until the test repairs it."""

    name = "http"

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.calls = 0
        self.numbers: set[int] = set()
        """The numbers of the attempts, as the receiver saw them."""
        self.well: UUID | None = None
        """The only workspace whose messages the transport accepts."""
        self.well_chats: set[UUID] = set()
        """The chats whose messages the transport accepts."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def check(self) -> str:
        return "ready"

    async def send(self, delivery: Delivery) -> Outcome:
        self.calls += 1
        self.numbers.add(delivery.attempt)
        await asyncio.sleep(0.001)
        well = delivery.workspace_id == self.well or delivery.chat_id in self.well_chats
        return Sent() if well else self.outcome

    def repair(self) -> None:
        """Accept every message from now on."""
        self.outcome = Sent()


@pytest.fixture
def started(database_url: str) -> Iterator[Callable[..., Pipeline]]:
    """Return a function that starts a pipeline with a breaker; the pipeline is drained after the test."""
    pipelines: list[Pipeline] = []

    def start(own: Settings, transport: Any, policy: RecoveryPolicy = QUICK) -> Pipeline:
        engine = make_async_engine(database_url, options=ONCE_PLANNED)
        pipeline = Pipeline(own, engine, transport, breaker_store=BreakerStore(own, "http", policy))
        pipeline.start()
        pipelines.append(pipeline)
        return pipeline

    yield start
    for pipeline in pipelines:
        assert pipeline.drain(timedelta(seconds=10)) == 0


CONCURRENCY = 8
SLOWLY = RecoveryPolicy(first_pause=600, longest_pause=600)


@pytest.mark.parametrize("outcome", [Retry("HTTP 500", status_code=500), Unknown("no answer within 10 s")])
def test_an_outage_uses_up_few_attempts(
    world: World, engine: Engine, own: Settings, started: Callable[..., Pipeline], outcome: Outcome
) -> None:
    """If every chat fails, follow-ups use up no more attempts once the breaker is open."""
    transport = FailingTransport(outcome)
    for _ in range(100):
        world.follow_up()
    own = own.model_copy(update={"concurrency": CONCURRENCY, "retry_base": timedelta(hours=1), "max_attempts": 3})
    started(own, transport, SLOWLY).submit(claim(engine, own).leases)
    wait_until(lambda: read(client(own), own).state == "open")
    wait_until(lambda: transport.calls == world.scalar("SELECT sum(attempts) FROM follow_ups"))
    assert FAILURES <= transport.calls <= FAILURES + 2 * CONCURRENCY
    assert world.scalar(PENDING) == 100
    wait_until(lambda: not world.scalar("SELECT count(*) FROM follow_ups WHERE begun_at IS NOT NULL"))
    assert transport.calls == world.scalar("SELECT sum(attempts) FROM follow_ups")


REJECTED = "SELECT count(*) FROM follow_ups WHERE reason LIKE 'rejected:%'"
SNOOZES = "SELECT sum(snoozes) FROM follow_ups"
SOON = {"concurrency": CONCURRENCY, "retry_base": timedelta(milliseconds=1), "retry_cap": timedelta(milliseconds=1)}


def all_are_sent_after(repair: Callable[[], None], world: World, engine: Engine, own: Settings, *to: Pipeline) -> None:
    """Repair the transport, and submit claimed follow-ups until none is pending.

    Check that no follow-up has used up an attempt before the attempt that ended it.
    """
    repair()

    def done() -> bool:
        for pipeline in to:
            pipeline.submit(claim(engine, own).leases)
        return bool(world.scalar(PENDING) == 0)

    wait_until(done, every=0.1)
    assert world.scalar("SELECT max(attempts) FROM follow_ups") == 1


def refusing(world: World, count: int) -> FailingTransport:
    """Insert due follow-ups, and return a transport that refuses them."""
    for _ in range(count):
        world.follow_up()
    return FailingTransport(REFUSED)


@pytest.mark.parametrize("status", [401, 403])
def test_few_are_rejected_if_the_receiver_refuses_every_message(
    world: World, engine: Engine, own: Settings, started: Callable[..., Pipeline], status: int
) -> None:
    """If a receiver refuses every message, for example because a secret expired, few follow-ups fail.

    A refused probe uses up no attempt. Once the receiver accepts messages again, all other follow-ups are sent.
    """
    transport = FailingTransport(Rejected(f"HTTP {status} unknown key", status))
    for _ in range(100):
        world.follow_up()
    own = own.model_copy(update=SOON)
    pipeline = started(own, transport)

    def probed(times: int) -> bool:
        pipeline.submit(claim(engine, own).leases)
        return read(client(own), own).probed >= times

    wait_until(lambda: probed(6), every=0.1)
    assert world.scalar(REJECTED) < FAILURES
    assert world.scalar(SNOOZES) >= 6
    shown = "SELECT DISTINCT concat_ws(' ', status_code, detail) FROM failed_attempts WHERE outcome = 'snoozed'"
    assert world.scalar(shown) == f"{status} HTTP {status} unknown key"
    all_are_sent_after(transport.repair, world, engine, own, pipeline)
    assert world.scalar(REJECTED) < FAILURES
    assert transport.numbers == {1}


def test_few_are_rejected_in_many_workspaces(
    world: World, engine: Engine, own: Settings, started: Callable[..., Pipeline]
) -> None:
    """If a receiver refuses every message, few follow-ups fail.

    This also holds if no workspace has enough follow-ups to be tripped.
    """
    transport = FailingTransport(REFUSED)
    for _ in range(40):
        World(engine).follow_up()
    own = own.model_copy(update=SOON)
    pipeline = started(own, transport)
    pipeline.submit(claim(engine, own).leases)
    wait_until(lambda: transport.calls == 40)
    all_are_sent_after(transport.repair, world, engine, own, pipeline)
    assert world.scalar(REJECTED) < FAILURES


def test_few_are_rejected_by_two_workers(
    world: World, engine: Engine, own: Settings, started: Callable[..., Pipeline]
) -> None:
    """If a receiver refuses every message, few follow-ups of each worker fail."""
    transport = refusing(world, 100)
    own = own.model_copy(update=SOON)
    pipelines = [started(own, transport), started(own, transport)]
    leases = claim(engine, own).leases
    for number, pipeline in enumerate(pipelines):
        pipeline.submit(leases[number::2])
    wait_until(lambda: read(client(own), own).probed >= 3)
    all_are_sent_after(transport.repair, world, engine, own, *pipelines)
    assert world.scalar(REJECTED) < FAILURES * 2


def test_few_are_rejected_without_redis(
    world: World,
    engine: Engine,
    own: Settings,
    started: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a receiver refuses every message while Redis is unreachable, few follow-ups fail."""
    monkeypatch.setattr(breaker, "REDIS_PAUSE", 0.1)
    transport = refusing(world, 30)
    nobody = type(own.broker_url)("redis://127.0.0.1:1/0")
    away = own.model_copy(update=SOON | {"concurrency": 1, "broker_url": nobody})
    pipeline = started(away, transport)
    pipeline.submit(claim(engine, away).leases)
    wait_until(lambda: transport.calls == 30)
    all_are_sent_after(transport.repair, world, engine, away, pipeline)
    assert world.scalar(REJECTED) < FAILURES


def test_refused_chats_do_not_keep_others_waiting(
    world: World, engine: Engine, own: Settings, started: Callable[..., Pipeline]
) -> None:
    """If many chats of a workspace are refused for ever, the workspace's other follow-ups are sent.

    Once a message of the workspace has been accepted, the refused follow-ups fail.
    """
    transport = refusing(world, 30)
    own = own.model_copy(update=SOON)
    pipeline = started(own, transport)
    pipeline.submit(claim(engine, own).leases)
    wait_until(lambda: read(client(own), own).probed >= 2)
    assert world.scalar(REJECTED) < FAILURES
    transport.well_chats = {world.chat() for _ in range(3)}
    for chat in transport.well_chats:
        world.follow_up(chat)

    def sent() -> bool:
        pipeline.submit(claim(engine, own).leases)
        return bool(world.scalar("SELECT count(*) FROM follow_ups WHERE status = 'sent'") == 3)

    wait_until(sent, every=0.1)


@pytest.mark.parametrize(
    "other",
    [Rejected("the chat's external id is not a Matrix room id"), Snoozed("HTTP 429", timedelta(hours=1), 429)],
    ids=["without a call", "rate limit"],
)
def test_a_rejection_without_a_call_or_a_rate_limit_is_no_success(own: Settings, other: Outcome) -> None:
    """Neither a message that the transport rejects without a call, nor a 429, restarts the count of failures."""

    async def script() -> None:
        door = Breaker(BreakerStore(own, "http", QUICK), "http", FAILURES)
        refused = Rejected("HTTP 401", 401)
        for follow_up in ids(FAILURES - 1):
            assert door.record(follow_up, KEY, refused) is refused
            assert door.record(uuid4(), OTHER, other) is other
        assert door.record(uuid4(), KEY, refused) == Snoozed("HTTP 401", REFUSED_DELAY, 401)

    asyncio.run(script())


@pytest.mark.parametrize("outcome", [Sent(), Rejected("HTTP 404", 404), Snoozed("HTTP 429", timedelta(hours=1))])
def test_stays_closed(
    world: World, engine: Engine, own: Settings, started: Callable[..., Pipeline], outcome: Outcome
) -> None:
    """Messages that are accepted, rate-limited or rejected with 404 keep the breaker closed."""
    transport = FailingTransport(outcome)
    for _ in range(30):
        world.follow_up()
    started(own, transport, SLOWLY).submit(claim(engine, own).leases)
    wait_until(lambda: transport.calls == 30)
    assert read(client(own), own).state == CLOSED


def test_all_are_sent_after_the_recovery(
    world: World, engine: Engine, own: Settings, started: Callable[..., Pipeline]
) -> None:
    """Once the transport has recovered, all waiting follow-ups are sent without an operator's action."""
    transport = FailingTransport(Retry("no connection"))
    for _ in range(100):
        world.follow_up()
    own = own.model_copy(update={"concurrency": CONCURRENCY, "retry_base": timedelta(milliseconds=1)})
    pipeline = started(own, transport)
    pipeline.submit(claim(engine, own).leases)
    wait_until(lambda: read(client(own), own).state == "open")
    transport.outcome = Sent()

    def done() -> bool:
        pipeline.submit(claim(engine, own).leases)  # retries of the follow-ups whose first attempts failed
        return bool(world.scalar(PENDING) == 0)

    wait_until(done, every=0.1)
    assert world.scalar("SELECT max(attempts) FROM follow_ups") < own.max_attempts
    wait_until(lambda: read(client(own), own).state == CLOSED)


@dataclass
class OpenedBreaker:
    """A pipeline whose breaker was opened by one failing workspace, and a second, healthy workspace."""

    engine: Engine
    settings: Settings
    transport: FailingTransport
    pipeline: Pipeline
    other: World

    def deliver(self) -> UUID:
        """Submit a follow-up of the healthy workspace and return the follow-up's id."""
        follow_up = self.other.follow_up()
        self.pipeline.submit(claim(self.engine, self.settings).leases)
        return follow_up

    @property
    def state(self) -> str:
        """The name of the breaker's state."""
        return read(client(self.settings), self.settings).state


@pytest.fixture
def opened_breaker(world: World, engine: Engine, own: Settings, started: Callable[..., Pipeline]) -> OpenedBreaker:
    """Return a pipeline whose breaker was opened by failures in a hundred chats of one workspace."""
    other, transport = World(engine), FailingTransport(Retry("HTTP 500"))
    transport.well = other.workspace_id
    for _ in range(100):
        world.follow_up()
    settings = own.model_copy(update={"concurrency": CONCURRENCY, "retry_base": timedelta(hours=1)})
    running = OpenedBreaker(engine, settings, transport, started(settings, transport, SLOWLY), other)
    running.pipeline.submit(claim(engine, settings).leases)
    wait_until(lambda: running.state == "open")
    return running


def test_other_workspaces_are_not_delayed(opened_breaker: OpenedBreaker) -> None:
    """If one workspace's failing chats open the breaker, other workspaces are not delayed."""
    for _ in range(3):
        quick = opened_breaker.deliver()
        wait_until(lambda quick=quick: [row.status for row in opened_breaker.other.rows(quick)] == ["sent"])
    assert opened_breaker.state == "open"  # a success of another workspace does not close the breaker
    assert opened_breaker.transport.calls <= FAILURES + 2 * CONCURRENCY + 3


def test_occasional_failures_are_not_delayed(opened_breaker: OpenedBreaker) -> None:
    """If all attempts of one workspace fail, another with occasional failures is not delayed."""

    def settled(follow_up: UUID, status: str) -> bool:
        row = opened_breaker.other.row(follow_up)
        return (row.status, row.attempts, row.begun_at) == (status, 1, None)

    for well, status in ((None, "pending"), (opened_breaker.other.workspace_id, "sent")) * 3:
        opened_breaker.transport.well = well
        one = opened_breaker.deliver()
        wait_until(lambda one=one, status=status: settled(one, status))
    assert opened_breaker.state == "open"


def test_a_refused_message_fails_while_others_are_accepted(opened_breaker: OpenedBreaker) -> None:
    """If one workspace is tripped, a refused message of another workspace still fails at once."""
    accepted = opened_breaker.deliver()
    wait_until(lambda: opened_breaker.other.row(accepted).status == "sent")
    opened_breaker.transport.well, opened_breaker.transport.outcome = None, REFUSED
    refused = opened_breaker.deliver()
    wait_until(lambda: opened_breaker.other.row(refused).reason == "rejected: HTTP 401 unknown key")
    assert opened_breaker.state == "open"


def test_deliveries_continue_without_redis(
    world: World,
    engine: Engine,
    own: Settings,
    started: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the breaker's state is unreachable, attempts still begin, with a pause after several failures.

    A metric counts how often the breaker's state was unreachable.
    """
    monkeypatch.setattr(breaker, "REDIS_PAUSE", 0.1)
    transport = FailingTransport(Retry("no connection"))
    for _ in range(30):
        world.follow_up()
    nobody = "redis://127.0.0.1:1/0"
    changes = {"retry_base": timedelta(hours=1), "concurrency": 1}
    away = own.model_copy(update=changes | {"broker_url": type(own.broker_url)(nobody)})
    before = metrics.BREAKER_UNAVAILABLE._value.get()  # noqa: SLF001 - the client has no public access
    pipeline = started(away, transport)
    pipeline.submit(claim(engine, away).leases)
    wait_until(lambda: transport.calls == 30)
    wait_until(lambda: world.scalar("SELECT sum(attempts) FROM follow_ups") == 30)
    # After every five failures, except the last five, the worker pauses at least once.
    assert metrics.BREAKER_UNAVAILABLE._value.get() - before >= 30 // FAILURES - 1  # noqa: SLF001 - the client has no public access

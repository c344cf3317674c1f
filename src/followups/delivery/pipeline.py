"""The pipeline of one worker process: leases in, begin, send, settle, all in one event loop.

    submit -> due queue -> slot -> begin -> send -> settle

Begin and settle form batches by themselves: while one statement runs, the next batch gathers. A call in flight holds a
slot, and nothing begins without one. So a slow chat costs one slot, and never holds up a batch.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import uvloop
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from followups.database_errors import is_passing
from followups.delivery import events
from followups.delivery.breaker import Breaker
from followups.delivery.clock import DatabaseClock
from followups.delivery.deferral import Deferral
from followups.delivery.due_queue import AGAIN, LONGEST_AGAIN, Line
from followups.delivery.rate_limiting import Turnstile
from followups.delivery.send import GRACE, send
from followups.delivery.settle import settle
from followups.halving import halve_within
from followups.store import chat_order
from followups.store import leases as lease_store
from followups.telemetry.logs import get_logger
from followups.transactions import in_loop, transact
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Sequence
    from uuid import UUID

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from followups.delivery.begin import Beginning
    from followups.delivery.breaker import BreakerStore
    from followups.delivery.fair_queue import Hinted
    from followups.delivery.rate_limiting import Limiter
    from followups.delivery.send import Attempt
    from followups.settings import Settings
    from followups.store.leases import Begun, Lease
    from followups.transports.port import Transport

BEGIN_SIZE = 200
SETTLE_SIZE = 500
"""Most rows of one statement: a larger one is slow and no cheaper for each row."""
GATHER = timedelta(milliseconds=5)
"""How long begin waits for more free slots, or for more follow-ups to come up, while there are few: a statement for
five rows costs almost as much as one for fifty. It is a third of begin's lead.
"""
ENOUGH_SLOTS = 0.4
"""Share of free slots that is worth a statement at once."""
ENOUGH_RESULTS = 100
"""Results that are worth a statement at once."""
SETTLE_GATHER = timedelta(milliseconds=30)
"""How long settle waits for so many. Only the next follow-up of a chat waits for it. Results that are not recorded when
the process is killed are sent again, under the same key; so it is no longer than a quick call, which a kill leaves open
too. If the receiver cannot deduplicate, their outcome would be unknown, so there it is `GATHER`.
"""
CONNECTIONS = 4
"""Simultaneous database connections: begin, settle, the clock, and leases deferred or returned."""
BACKOFF = timedelta(seconds=0.5)
"""First pause before an unreachable database is tried again; it doubles up to `LONGEST_BACKOFF`."""
LONGEST_BACKOFF = timedelta(seconds=4)
SETTLE_BACKOFF = timedelta(seconds=1)
"""The same for results, which must be recorded before a tick takes their leases for lost."""
CLOCK_INTERVAL = 5.0
"""Seconds between samples of the database's clock."""
CLOCK_OFF = 60.0
"""Seconds by which this host's clock may differ from the database's without a warning."""

log = get_logger(__name__)


class Pipeline:
    """Delivers submitted leases until it is drained. `start`, `submit` and `drain` are safe from any thread."""

    def __init__(
        self,
        settings: Settings,
        engine: AsyncEngine,
        transport: Transport,
        nudge: Callable[[], None] = lambda: None,
        limiter: Limiter | None = None,
        breaker_store: BreakerStore | None = None,
    ) -> None:
        """``nudge`` is called when a retry falls due before the next tick; without a limiter there are no limits."""
        self._settings = settings
        self._engine = engine
        self._transport = transport
        self._nudge = nudge
        self._turnstile = Turnstile(settings, engine, limiter)
        self._clock = DatabaseClock()
        self._line = Line(self._clock, settings.lease, settings.concurrency)
        self._breaker = Breaker(breaker_store, transport.name, settings.breaker_failures)
        self._deferral = Deferral(settings, engine, self._line, self._breaker, nudge)
        self._results: list[Attempt] = []
        self._drained = False
        self._free = settings.concurrency
        self._sends: set[asyncio.Task[None]] = set()
        self._draining = False
        self._changed = asyncio.Event()
        self._settleable = asyncio.Event()
        self._deferrable = asyncio.Event()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)

    def start(self) -> None:
        """Start the event loop; it opens the transport and samples the database's clock before it sends."""
        self._thread.start()

    def submit(self, leases: Sequence[Lease], task_id: str = "") -> None:
        """Submit leases to be delivered, each at its due moment. Returns at once."""
        self._loop.call_soon_threadsafe(self._accept, list(leases), task_id)

    def ask(self, answer: Callable[[], None]) -> None:
        """Have the event loop call ``answer``, as a proof that it turns. After its end nothing is called."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(answer)

    def stop_beginning(self) -> None:
        """Stop beginning; what is in flight goes on. Returns at once."""
        self.ask(self._stop_beginning)

    def drain(self, limit: timedelta) -> int:
        """Stop beginning, let the calls in flight end, settle them, and release the rest.

        Returns how many results could not be recorded within ``limit``; their leases will run out.
        """
        if not self._thread.is_alive():
            return 0
        self.stop_beginning()
        self._thread.join(limit.total_seconds())
        events.lines.flush()  # also the lines of results that could not be settled
        return len(self._results) + len(self._sends)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except BaseException:  # SystemExit from a plug-in's code must not end this thread unnoticed
            log.exception("pipeline_died")
            # Fail, so that a supervisor restarts this process; its leases go to other workers.
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            events.lines.flush()
            self._loop.close()

    async def _main(self) -> None:
        await self._transport.open()
        await self._insist(lambda engine: self._clock.ask(engine, times=5), "clock")
        await self._insist(self._turnstile.read, "limits")
        # A loop that dies ends the others too: a worker that only seems to work is worse than none.
        async with asyncio.TaskGroup() as pumps:
            refresher = pumps.create_task(self._keep_time())
            informer = pumps.create_task(self._breaker.keep_informed(self._wanted, self._look_again))
            settler = pumps.create_task(self._keep_settling())
            deferrer = pumps.create_task(self._keep_deferring())
            await self._keep_beginning()
            await deferrer
            await self._give_back()
            while self._sends:
                await asyncio.gather(*self._sends, return_exceptions=True)
            self._drained = True
            self._settleable.set()
            await settler
            refresher.cancel()
            informer.cancel()
        await self._give_back()  # what settle unblocked
        await self._transport.close()
        await self._turnstile.close()
        await self._engine.dispose()
        log.info("drained")

    # The due queue: leases by the moment they may begin.

    def _accept(self, leases: Sequence[Lease], task_id: str = "") -> None:
        self._line.add(leases, task_id)
        self._look_again()

    def _look_again(self) -> None:
        self._changed.set()
        self._deferrable.set()

    def _stop_beginning(self) -> None:
        self._draining = True
        self._look_again()

    async def _keep_deferring(self) -> None:
        while not self._draining:
            self._deferrable.clear()
            pause = await self._deferral.balance()
            await (self._deferrable.wait() if pause is None else asyncio.sleep(pause))

    async def _give_back(self) -> None:
        given = self._line.clear() + self._deferral.clear()
        if given:
            await self._insist(lambda engine: _release(engine, given), "release")

    # Begin: only with a slot, right before the moment.

    async def _keep_beginning(self) -> None:
        backoff = BACKOFF
        while not self._draining:
            await self._gather()
            if self._draining:
                return
            batch = self._ready()
            if not batch:
                await self._until_something_is_ready()
                continue
            self._free -= len(batch)
            started = uptime()
            leases = [hinted.lease for hinted in batch]
            try:
                beginning = await self._turnstile.begin(leases)
            except Exception as error:  # noqa: BLE001 - whatever it was, the pump must go on
                events.failed("begin", error, self._engine.sync_engine)
                self._let_go(batch)
                for hinted in batch:
                    self._line.put_off(hinted, backoff)
                await asyncio.sleep(backoff.total_seconds())
                backoff = min(backoff * 2, LONGEST_BACKOFF)
                continue
            backoff = BACKOFF
            events.succeeded("begin")
            self._follow_up(beginning, {hinted.lease.id: hinted for hinted in batch}, started)

    async def _gather(self) -> None:
        """Wait for a batch worth a statement while slots are few, or while nothing is due within begin's lead."""
        if not self._line.is_anybodys_moment():
            return
        if 0 < self._free < ENOUGH_SLOTS * self._settings.concurrency:
            await asyncio.sleep(GATHER.total_seconds())
        elif (delay := self._line.seconds_to_next()) and (room := delay + GATHER.total_seconds()) > 0:
            await asyncio.sleep(room)

    def _follow_up(self, beginning: Beginning, batch: dict[UUID, Hinted], started: float) -> None:
        self._breaker.spend(batch[one.lease.id].lease.lane for one in beginning.begun)
        for one in beginning.begun:
            self._spawn(self._deliver(one, batch.pop(one.lease.id), started))
        self._let_go(batch.values())
        events.ended(beginning.ended)
        for lease in beginning.again:
            self._line.defer_again(batch[lease.id])
        for lease, wait in beginning.later:
            self._line.put_off(batch[lease.id], wait)
        self._accept(beginning.woken)
        if beginning.locked:
            self._spawn(self._unblock(beginning.locked))

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(work)
        self._sends.add(task)
        task.add_done_callback(self._sends.discard)

    def _let_go(self, hinted: Collection[Hinted]) -> None:
        self._free += len(hinted)
        for one in hinted:
            self._line.leave(one)
        self._line.let_go(one.lease.id for one in hinted)

    def _ready(self) -> list[Hinted]:
        if len(self._results) > self._settings.max_in_flight:
            return []  # the database is slower than the transport: accepted results are recorded first
        return self._line.take(min(self._free, BEGIN_SIZE), self._breaker.held, self._breaker.permits)

    def _wanted(self) -> int:
        return min(self._free, BEGIN_SIZE) if self._line.keeps(self._breaker.held) else 0

    async def _until_something_is_ready(self) -> None:
        self._changed.clear()
        timer = None
        delay = self._line.seconds_to_next(self._breaker.held if not self._breaker.permits else frozenset())
        if delay is not None and self._free:
            timer = self._loop.call_later(max(delay, 0.001), self._changed.set)
        await self._changed.wait()
        if timer:
            timer.cancel()

    # Send: one task for each call.

    async def _deliver(self, begun: Begun, hinted: Hinted, started: float) -> None:
        limit = self._settings.transport_timeout
        # The lease minus the call's limit, counted from before begin: a later call could end after the lease.
        latest = started + (self._settings.lease - limit - GRACE).total_seconds()
        attempt = None
        try:
            attempt = await send(self._transport, begun, self._clock, limit, latest)
        finally:
            self._free += 1
            self._line.leave(hinted)
            self._changed.set()
            if attempt is None:
                self._line.let_go([begun.lease.id])
        if attempt is None:
            events.abandoned(begun)
            return
        self._breaker.note(attempt)
        self._results.append(attempt)
        self._settleable.set()
        events.attempted(attempt, self._transport.name, hinted.task_id)

    # Settle: what was accepted is recorded at once.

    async def _keep_settling(self) -> None:
        gather = SETTLE_GATHER if self._settings.transport_deduplicates else GATHER
        while True:
            await self._settleable.wait()
            self._settleable.clear()
            if len(self._results) < ENOUGH_RESULTS and not self._drained:
                await asyncio.sleep(gather.total_seconds())
            if batch := self._results[:SETTLE_SIZE]:
                events.lines.flush()
                await self._settle(batch)
                del self._results[: len(batch)]
                self._changed.set()
            if self._results:  # these have arrived meanwhile
                self._settleable.set()
            elif self._drained and not self._sends:
                return

    async def _settle(self, batch: Sequence[Attempt]) -> None:
        backoff = BACKOFF
        while True:
            try:
                settling = await in_loop(self._engine, settle, self._settings, batch)
                break
            except Exception as error:  # noqa: BLE001 - whatever it was, the results must not be lost
                events.failed("settle", error, self._engine.sync_engine)
                events.lines.flush()  # of what was sent meanwhile, since an outage may be long
                if not is_passing(error):
                    await self._settle_apart(batch)
                    return
                await asyncio.sleep(backoff.total_seconds())
                backoff = min(backoff * 2, SETTLE_BACKOFF)
        events.succeeded("settle")
        events.settled(settling)
        self._line.let_go({a.begun.lease.id for a in batch} - {a.begun.lease.id for a in settling.held})
        self._settle_later(settling.held, AGAIN)
        self._accept(settling.woken)
        if settling.locked:
            self._spawn(self._unblock(settling.locked))
        horizon = self._clock.now() + self._settings.tick_interval
        if any(one.next_attempt_at and one.next_attempt_at < horizon for one in settling.settled):
            self._nudge()

    async def _settle_apart(self, batch: Sequence[Attempt]) -> None:
        """Isolate a result that the database refuses, so that it does not hold up the others."""
        if len(batch) > 1:
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                await self._settle(half)
        elif uptime() - batch[0].answered < self._settings.lease.total_seconds():
            self._settle_later(batch, SETTLE_BACKOFF)
        else:
            self._line.let_go([batch[0].begun.lease.id])
            log.error("settle_refused", follow_up_id=str(batch[0].begun.lease.id))

    def _settle_later(self, attempts: Sequence[Attempt], delay: timedelta) -> None:
        for attempt in attempts:
            self._spawn(self._bring_back(attempt, delay))

    async def _bring_back(self, attempt: Attempt, delay: timedelta) -> None:
        await asyncio.sleep(delay.total_seconds())
        self._results.append(attempt)
        self._settleable.set()

    # Order within a chat: follow-ups that were locked when their turn came.

    async def _unblock(self, ended: Collection[UUID]) -> None:
        """Unblock the follow-ups that wait for the ended ones, once no transaction locks them.

        While the pipeline drains, this is left to dispatchers.
        """
        pause = AGAIN
        while ended and not self._draining:
            await asyncio.sleep(pause.total_seconds())
            pause = min(pause * 2, LONGEST_AGAIN)
            try:
                work = partial(chat_order.unblock_writable, ended=ended, lease=self._settings.lease)
                unblocked = await in_loop(self._engine, transact, work)
            except (DBAPIError, PoolTimeoutError) as error:
                events.failed("unblock", error, self._engine.sync_engine)
            else:
                self._accept(unblocked.leases)
                ended = unblocked.locked

    # The database, from within the event loop.

    async def _keep_time(self) -> None:
        told = False
        while True:
            ahead = (datetime.now(UTC) - self._clock.now()).total_seconds()
            if abs(ahead) > CLOCK_OFF and not told:
                events.clock_off(ahead)
            told = abs(ahead) > CLOCK_OFF
            await asyncio.sleep(CLOCK_INTERVAL)
            await self._insist(self._clock.ask, "clock")
            await self._insist(self._turnstile.read, "limits")

    async def _insist(self, work: Callable[[Engine], object], step: str) -> None:
        backoff = BACKOFF
        while True:
            try:
                await in_loop(self._engine, work)
            except (DBAPIError, PoolTimeoutError) as error:
                events.failed(step, error, self._engine.sync_engine)
            else:
                events.succeeded(step)
                return
            if step in {"clock", "limits"} and self._draining:
                return
            await asyncio.sleep(backoff.total_seconds())
            backoff = min(backoff * 2, LONGEST_BACKOFF)


def _release(engine: Engine, given: Sequence[Lease]) -> None:
    with engine.begin() as connection:  # a row that cannot be written keeps its lease until that ends
        halve_within(connection, given, partial(lease_store.release_if_not_begun, connection))

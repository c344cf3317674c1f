"""The pipeline of one worker process: leases in, begin, send, settle; one event loop for all of it.

    submit -> waiting (by due moment) -> slot -> begin -> send -> settle

Begin and settle are micro-batched by themselves: while one statement is under way, the next batch
gathers. A call in flight holds a slot, and nothing begins without one; so a slow chat costs one slot,
and never holds up a batch.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from followups.database import is_passing
from followups.dispatch import report
from followups.dispatch.begin import LEAD, begin
from followups.dispatch.clock import DatabaseClock
from followups.dispatch.send import send
from followups.dispatch.settle import settle
from followups.store import leases as lease_store
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.dispatch.begin import Beginning
    from followups.dispatch.send import Attempt
    from followups.settings import Settings
    from followups.store.leases import Begun, Lease
    from followups.transports.port import Transport

BEGIN_SIZE = 200
SETTLE_SIZE = 500
"""Rows of one statement at most: beyond, a statement is slow and no cheaper a row."""
DATABASE_THREADS = 4
AGAIN = timedelta(milliseconds=50)
"""How long to leave alone what somebody else holds at this moment."""
BACKOFF = timedelta(seconds=0.5)
"""How long to leave a database alone that does not answer; doubles up to `LONGEST_BACKOFF`."""
LONGEST_BACKOFF = timedelta(seconds=4)
CLOCK_INTERVAL = 5.0
"""Seconds between samples of the database's clock."""

T = TypeVar("T")
log = get_logger(__name__)


class Pipeline:
    """Delivers what it is handed, until it is drained. `start`, `submit` and `drain` may be called from any thread."""

    def __init__(
        self, settings: Settings, engine: Engine, transport: Transport, nudge: Callable[[], None] = lambda: None
    ) -> None:
        """``nudge`` is called when something falls due again before the next tick."""
        self._settings = settings
        self._engine = engine
        self._transport = transport
        self._nudge = nudge
        self._clock = DatabaseClock()
        self._waiting: list[tuple[datetime, int, Lease, str]] = []
        self._sequence = itertools.count()
        self._results: list[Attempt] = []
        self._free = settings.concurrency
        self._sends: set[asyncio.Task[None]] = set()
        self._draining = False
        self._changed = asyncio.Event()
        self._settleable = asyncio.Event()
        self._threads = ThreadPoolExecutor(DATABASE_THREADS, thread_name_prefix="database")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)

    def start(self) -> None:
        """Start the event loop; it opens the transport and asks the database for the time before it sends."""
        self._thread.start()

    def submit(self, leases: Sequence[Lease], task_id: str = "") -> None:
        """Hand over leases to be delivered, each at its due moment. Returns at once."""
        self._loop.call_soon_threadsafe(self._accept, list(leases), task_id)

    def drain(self, limit: timedelta) -> int:
        """Begin nothing more, let the calls in flight end and settle them, give the rest back.

        Returns how many results could not be recorded within ``limit``; their leases will expire.
        """
        if not self._thread.is_alive():
            return 0
        self._loop.call_soon_threadsafe(self._stop_beginning)
        self._thread.join(limit.total_seconds())
        return len(self._results) + len(self._sends)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except Exception:
            log.exception("pipeline_died")
            # Fail, and be restarted by whoever watches this process; its leases go to others.
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            self._threads.shutdown(wait=False)
            self._loop.close()

    async def _main(self) -> None:
        await self._transport.open()
        await self._insist(lambda: self._clock.ask(self._engine, times=5), "clock")
        # A pump that dies takes the others with it: a worker that only seems to work is worse than none.
        async with asyncio.TaskGroup() as pumps:
            refresher = pumps.create_task(self._keep_time())
            settler = pumps.create_task(self._keep_settling())
            await self._keep_beginning()
            await self._give_back()
            await asyncio.gather(*self._sends)
            self._settleable.set()
            await settler
            refresher.cancel()
        await self._give_back()  # what settling woke
        await self._transport.close()
        log.info("drained")

    # Waiting: leases by the moment they may begin.

    def _accept(self, leases: Sequence[Lease], task_id: str = "") -> None:
        for lease in leases:
            heapq.heappush(self._waiting, (lease.due, next(self._sequence), lease, task_id))
        self._changed.set()

    def _accept_later(self, leases: Sequence[Lease], task_id: str, delay: timedelta) -> None:
        moment = self._clock.now() + delay
        for lease in leases:
            heapq.heappush(self._waiting, (max(moment, lease.due), next(self._sequence), lease, task_id))

    def _stop_beginning(self) -> None:
        self._draining = True
        self._changed.set()

    async def _give_back(self) -> None:
        given = [lease for _, _, lease, _ in self._waiting]
        self._waiting.clear()
        if given:
            await self._insist(lambda: self._release(given), "release")

    def _release(self, given: list[Lease]) -> None:
        with self._engine.begin() as connection:
            lease_store.release_if_not_begun(connection, given)

    # Begin: only what has a slot, right before its moment.

    async def _keep_beginning(self) -> None:
        while not self._draining:
            batch = self._ready()
            if not batch:
                await self._until_something_is_ready()
                continue
            self._free -= len(batch)
            leases = [lease for lease, _ in batch]
            task_ids = {lease.id: task_id for lease, task_id in batch}
            try:
                beginning = await self._in_thread(partial(begin, self._engine, self._settings, leases))
            except Exception as error:  # noqa: BLE001 - whatever it was, the pump must go on
                report.failed("begin", error, self._engine)
                self._free += len(batch)
                for lease, task_id in batch:
                    self._accept_later([lease], task_id, BACKOFF)
                continue
            self._free += len(batch) - len(beginning.begun)
            self._follow_up(beginning, task_ids)

    def _follow_up(self, beginning: Beginning, task_ids: dict[UUID, str]) -> None:
        for one in beginning.begun:
            task = self._loop.create_task(self._deliver(one, task_ids[one.lease.id]))
            self._sends.add(task)
            task.add_done_callback(self._sends.discard)
        report.ended(beginning.ended)
        for lease in beginning.again:
            self._accept_later([lease], task_ids[lease.id], AGAIN)
        self._accept(beginning.woken)

    def _ready(self) -> list[tuple[Lease, str]]:
        if len(self._results) > self._settings.max_in_flight:
            return []  # the database is slower than the transport: what is accepted is recorded first
        horizon = self._clock.now() + LEAD
        most = min(self._free, BEGIN_SIZE)
        batch: list[tuple[Lease, str]] = []
        while len(batch) < most and self._waiting and self._waiting[0][0] <= horizon:
            _, _, lease, task_id = heapq.heappop(self._waiting)
            batch.append((lease, task_id))
        return batch

    async def _until_something_is_ready(self) -> None:
        self._changed.clear()
        timer = None
        if self._waiting and self._free:
            delay = max(self._clock.until(self._waiting[0][0] - LEAD), 0.001)
            timer = self._loop.call_later(delay, self._changed.set)
        await self._changed.wait()
        if timer:
            timer.cancel()

    # Send: one task a call.

    async def _deliver(self, begun: Begun, task_id: str) -> None:
        try:
            attempt = await send(self._transport, begun, self._clock, self._settings.transport_timeout)
        finally:
            self._free += 1
            self._changed.set()
        self._results.append(attempt)
        self._settleable.set()
        report.attempted(attempt, self._transport.name, task_id)

    # Settle: what was accepted is recorded at once.

    async def _keep_settling(self) -> None:
        while True:
            await self._settleable.wait()
            self._settleable.clear()
            while self._results:
                batch = self._results[:SETTLE_SIZE]
                await self._settle(batch)
                del self._results[: len(batch)]  # others have come behind it meanwhile
                self._changed.set()
            if self._draining and not self._sends:
                return

    async def _settle(self, batch: Sequence[Attempt]) -> None:
        backoff = BACKOFF
        while True:
            try:
                settling = await self._in_thread(lambda: settle(self._engine, self._settings, batch))
                break
            except Exception as error:  # noqa: BLE001 - whatever it was, the results must not be lost
                report.failed("settle", error, self._engine)
                if not is_passing(error):
                    await self._settle_apart(batch)
                    return
                await asyncio.sleep(backoff.total_seconds())
                backoff = min(backoff * 2, LONGEST_BACKOFF)
        report.settled(settling)
        self._accept(settling.woken)
        horizon = self._clock.now() + self._settings.tick_interval
        if any(one.next_attempt_at and one.next_attempt_at < horizon for one in settling.settled):
            self._nudge()

    async def _settle_apart(self, batch: Sequence[Attempt]) -> None:
        """Keep one result that the database refuses from holding up the others."""
        if len(batch) == 1:
            log.error("settle_refused", follow_up_id=str(batch[0].begun.lease.id))
            return
        for attempt in batch:
            await self._settle([attempt])

    # The database, from the loop.

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(CLOCK_INTERVAL)
            await self._insist(lambda: self._clock.ask(self._engine), "clock")

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return self._loop.run_in_executor(self._threads, work)

    async def _insist(self, work: Callable[[], object], step: str) -> None:
        backoff = BACKOFF
        while True:
            try:
                await self._in_thread(work)
            except (DBAPIError, PoolTimeoutError) as error:
                report.failed(step, error, self._engine)
            else:
                return
            if step == "clock" and self._draining:
                return
            await asyncio.sleep(backoff.total_seconds())
            backoff = min(backoff * 2, LONGEST_BACKOFF)

"""A worker's pipeline, which begins, sends and settles leases in one event loop.

    submit -> due queue -> slot -> begin -> send -> settle

Begins and settles are batched: while one statement runs, the next batch is gathered. Each call in flight occupies a
slot. Without a free slot, no follow-up begins. A slow chat occupies one slot, but does not delay a batch.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import uvloop
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from followups.delivery import events
from followups.delivery.begin import begin_within_limits
from followups.delivery.claim import release
from followups.delivery.clock import DatabaseClock
from followups.delivery.deferral import Deferral
from followups.delivery.due_queue import BEGIN_BATCH, LEAD, LONGEST_RETRY_DELAY, RETRY_DELAY, DueQueue
from followups.delivery.send import CALL_GRACE, CallTimeout, send
from followups.delivery.settle import Settler
from followups.delivery.slots import Slots
from followups.delivery.upkeep import BACKOFF, LONGEST_BACKOFF, Upkeep, repeat_until_done
from followups.flow_control.breaker import Breaker
from followups.flow_control.limiter import RateLimits
from followups.store import chat_order
from followups.telemetry.logs import get_logger
from followups.transactions import in_loop, transact
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Sequence
    from datetime import timedelta
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine

    from followups.delivery.attempts import Attempt, BatchResult, Begun
    from followups.flow_control.breaker import BreakerStore
    from followups.flow_control.limiter import Limiter
    from followups.settings import Settings
    from followups.store.leases import Lease
    from followups.transports.port import Transport

CONNECTIONS = 4
"""Database connections for begin, settle, the clock, and the deferral or release of leases."""

log = get_logger(__name__)


class Pipeline:
    """Delivers the submitted leases until the pipeline is drained.

    `start`, `submit` and `drain` may be called from any thread.
    """

    def __init__(
        self,
        settings: Settings,
        engine: AsyncEngine,
        transport: Transport,
        nudge: Callable[[], None] = lambda: None,
        limiter: Limiter | None = None,
        breaker_store: BreakerStore | None = None,
    ) -> None:
        """Create the pipeline; it calls ``nudge`` when a retry falls due before the next tick.

        Without a limiter there are no rate limits.
        """
        self._settings = settings
        self._engine = engine
        self._transport = transport
        self._nudge = nudge
        self._clock = DatabaseClock()
        self._timeout = CallTimeout(settings.transport_timeout + CALL_GRACE)
        self._slots = Slots(settings.concurrency)
        self._queue = DueQueue(self._clock, settings.lease, self._slots)
        self._rate_limits = RateLimits(settings, engine, limiter, LEAD)
        self._breaker = Breaker(breaker_store, transport.name, settings.breaker_failures)
        self._deferral = Deferral(settings, engine, self._queue, self._breaker, nudge, self._not_begun)
        self._settler = Settler(settings, engine, self._settled)
        self._upkeep = Upkeep(engine, self._clock, self._rate_limits)
        self._tasks: set[asyncio.Task[None]] = set()
        """Tasks that make calls, and tasks that unblock follow-ups once their rows are no longer locked."""
        self._backoff = BACKOFF
        self._draining = False
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="pipeline", daemon=True)

    # The following methods may be called from any thread.

    def start(self) -> None:
        """Start the event loop.

        Before the first send, the event loop opens the transport and samples the database's clock.
        """
        self._thread.start()

    def submit(self, leases: Sequence[Lease], task_id: str = "") -> None:
        """Accept leases for delivery at their due times, and return immediately."""
        self._loop.call_soon_threadsafe(self._enqueue, list(leases), task_id)

    def ask(self, answer: Callable[[], None]) -> None:
        """Call ``answer`` in the event loop, to prove that the loop is running.

        ``answer`` is not called after the event loop has ended.
        """
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(answer)

    def stop_beginning(self) -> None:
        """Begin no further follow-ups; attempts in flight continue, and this function returns immediately."""
        self.ask(self._close)

    def drain(self, limit: timedelta) -> int:
        """Begin no more follow-ups, settle the calls in flight, and release the unused leases.

        Returns how many results could not be recorded within ``limit``. If a result could not be recorded, the
        follow-up's lease expires.
        """
        if not self._thread.is_alive():
            return 0
        self.stop_beginning()
        self._thread.join(limit.total_seconds())
        events.flush()  # this counts and logs the attempts whose results were not settled
        return len(self._settler) + len(self._tasks)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self.run())
        except BaseException:  # a plug-in that raises SystemExit must not end this thread unnoticed
            log.exception("pipeline_died")
            # The process ends with an error, so that a supervisor restarts it. The leases of the process expire, and
            # other workers take them over.
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            events.flush()
            self._loop.close()

    # The following methods run in the event loop.

    async def run(self) -> None:
        """Dequeue due leases, begin their attempts, send, and settle the outcomes, until the pipeline is drained."""
        await self._transport.open()
        if await self._upkeep.start(lambda: self._draining):
            # If one loop crashes, the other loops end too: a half-working worker is worse than none.
            async with asyncio.TaskGroup() as beside:
                upkeep = beside.create_task(self._upkeep.run())
                breaker = beside.create_task(self._breaker.run(self._waiting_for_breaker, self._check_again))
                deferral = beside.create_task(self._deferral.run())
                settler = beside.create_task(self._settler.run())
                while leases := await self._take():
                    started = uptime()
                    for begun in await self._begin(leases):
                        self._spawn(self._send(begun, started))
                await deferral
                await self._release_unbegun()
                await self._finish_calls()
                await settler
                upkeep.cancel()
                breaker.cancel()
        await self._release_unbegun()  # recording the outcomes may have unblocked further follow-ups
        await self._stop()

    async def _take(self) -> list[Lease]:
        """Wait for due leases and free slots; return no leases once the pipeline is draining."""
        await self._settler.keep_up()
        return await self._queue.next_batch(self._breaker)

    async def _begin(self, leases: Sequence[Lease]) -> tuple[Begun, ...]:
        """Begin the follow-ups that may be sent; put those to be tried again back into the due queue."""
        try:
            step = await begin_within_limits(self._engine, self._settings, self._rate_limits, leases)
        except Exception as error:  # noqa: BLE001 - whatever it was, the loop must go on
            events.failed("begin", error, self._engine.sync_engine)
            self._release(leases)
            for lease in leases:
                self._queue.defer(lease, self._backoff)
            await asyncio.sleep(self._backoff.total_seconds())
            self._backoff = min(self._backoff * 2, LONGEST_BACKOFF)
            return ()
        self._backoff = BACKOFF
        events.succeeded("begin")
        self._breaker.spend(one.lease.key for one in step.begun)
        if len(step.begun) < len(leases):
            begun = {one.lease.id for one in step.begun}
            self._release([lease for lease in leases if lease.id not in begun])
        for lease, wait in step.deferred:
            self._queue.defer(lease, wait)
        self._not_begun(step)
        return step.begun

    def _not_begun(self, step: BatchResult) -> None:
        """Enqueue the follow-ups to try again shortly, and those that were unblocked; log those that have ended."""
        events.ended(step.ended)
        for lease in step.retry_later:
            self._queue.defer_refused(lease)
        self._enqueue_unblocked(step)

    async def _send(self, begun: Begun, started: float) -> None:
        """Send one follow-up at its due time, and pass the outcome on to be settled."""
        # The latest time to start a call is the lease's end minus the call's time limit. The lease is counted from just
        # before the begin statement. A call that starts too late might outlast its lease.
        latest = started + self._settings.lease.total_seconds() - self._timeout.seconds
        attempt = None
        try:
            attempt = await send(self._transport, begun, self._clock, self._timeout, latest, self._breaker)
        finally:
            self._slots.release(begun.lease)
            self._queue.changed.set()
            if attempt is None:
                self._slots.release_poison_quota([begun.lease.id])
        if attempt is None:
            events.abandoned(begun)
            return
        self._settler.add(attempt)
        events.attempted(attempt, self._transport.name)

    def _settled(self, step: BatchResult, attempts: Sequence[Attempt]) -> None:
        self._slots.release_poison_quota(attempt.begun.lease.id for attempt in attempts)
        self._queue.changed.set()
        self._enqueue_unblocked(step)
        horizon = self._clock.now() + self._settings.tick_interval
        if any(one.next_attempt_at and one.next_attempt_at < horizon for one in step.settled):
            self._nudge()

    def _enqueue_unblocked(self, step: BatchResult) -> None:
        """Enqueue unblocked follow-ups, and those with locked rows as soon as the rows are unlocked."""
        self._enqueue(step.unblocked)
        if step.blocking:
            self._spawn(self._unblock_later(step.blocking))

    async def _unblock_later(self, ended: Collection[UUID]) -> None:
        """Unblock follow-ups that wait for one that has ended, each as soon as its row is unlocked.

        When the pipeline drains, the dispatchers unblock the remaining follow-ups.
        """
        pause = RETRY_DELAY
        while ended and not self._draining:
            await asyncio.sleep(pause.total_seconds())
            pause = min(pause * 2, LONGEST_RETRY_DELAY)
            try:
                work = partial(chat_order.unblock_writable, ended=ended, lease=self._settings.lease)
                unblocked, ended = await in_loop(self._engine, transact, work)
            except (DBAPIError, PoolTimeoutError) as error:
                events.failed("unblock", error, self._engine.sync_engine)
            else:
                self._enqueue(unblocked)

    def _enqueue(self, leases: Sequence[Lease], task_id: str = "") -> None:
        self._queue.add(leases, task_id)
        self._deferral.check_again()

    def _release(self, leases: Collection[Lease]) -> None:
        """Release the slots of leases that did not begin."""
        for lease in leases:
            self._slots.release(lease)
        self._slots.release_poison_quota(lease.id for lease in leases)

    def _waiting_for_breaker(self) -> int:
        """Return how many follow-ups of tripped workspaces could begin now."""
        return min(self._slots.free, BEGIN_BATCH) if self._queue.count(self._breaker.tripped) else 0

    def _check_again(self) -> None:
        self._queue.changed.set()
        self._deferral.check_again()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The following methods drain the pipeline.

    def _close(self) -> None:
        self._draining = True
        self._queue.close()
        self._deferral.close()

    async def _finish_calls(self) -> None:
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._settler.close()

    async def _release_unbegun(self) -> None:
        """Release the leases of the follow-ups that have not begun."""
        leases = self._queue.clear() + self._deferral.clear()
        if leases:
            await repeat_until_done(self._engine, partial(release, batch=leases), "release")

    async def _stop(self) -> None:
        await self._transport.close()
        await self._rate_limits.close()
        await self._engine.dispose()
        log.info("drained")

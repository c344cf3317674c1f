"""Settle: turn each attempt's outcome into a settlement, and record settlements in batches."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from followups.database_errors import concerns_a_row, is_passing
from followups.delivery import events
from followups.delivery.attempts import BatchResult
from followups.delivery.send import OUTCOME_NAMES
from followups.retry_policy import MIN_RETRY_AFTER, spread
from followups.states import FINAL, MAX_REASON_LENGTH, ReasonCode, Status, finish
from followups.store import chat_order, settlement
from followups.store.settlement import Failure, Settlement
from followups.telemetry.logs import get_logger
from followups.transactions import in_loop, transact
from followups.transports.port import Rejected, Retry, Sent, Snoozed, Unknown
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from uuid import UUID

    from sqlalchemy import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from followups.delivery.attempts import Attempt
    from followups.retry_policy import RetryPolicy
    from followups.settings import Settings
    from followups.store.leases import Lease
    from followups.store.settlement import SettledFollowUp

    Unblock = Callable[[Connection, Collection[UUID], timedelta], tuple[list[Lease], list[UUID]]]

SETTLE_BATCH = 500
"""The largest number of rows in one statement. A larger statement would take longer without saving time per row.

If this many results are already waiting, they are recorded without a wait. With a limit of 100, a follow-up took a
quarter more processor time during a backlog than with 250.
"""
GATHER = timedelta(milliseconds=30)
"""How long results are gathered before one statement records up to `SETTLE_BATCH` of them.

The wait delays only the next follow-up of each chat. If the worker is killed, the gathered results are lost, and their
messages are sent again under the same keys.
"""
SHORT_GATHER = timedelta(milliseconds=5)
"""How long results are gathered before they are recorded, if the endpoint cannot deduplicate. If the process is killed,
all unrecorded outcomes become unknown.
"""
SETTLE_RETRY_DELAY = timedelta(milliseconds=50)
"""How long settle waits before it retries a row that another transaction has locked or just updated."""
BACKOFF = timedelta(seconds=0.5)
"""First pause before an unreachable database is tried again; each pause is twice the previous one."""
LONGEST_BACKOFF = timedelta(seconds=1)
"""Longest pause before an unreachable database is tried again. During a longer pause, leases could expire before their
outcomes are recorded.
"""

log = get_logger(__name__)

NOT_KNOWN = ": the outcome of the attempt in flight is unknown"
DETAIL_LENGTH = MAX_REASON_LENGTH - 100
"""Before text is added to a detail, the detail is cut to this many characters."""


class Settler:
    """Records the outcomes of attempts in batches; a batch is recorded when full or after a short wait.

    An accepted message is recorded without waiting for slower calls. While the database is unreachable, recording is
    retried. A single result that the database rejects is retried for the length of a lease. An instance belongs to one
    event loop.
    """

    def __init__(
        self, settings: Settings, engine: AsyncEngine, settled: Callable[[BatchResult, Sequence[Attempt]], None]
    ) -> None:
        """Call ``settled`` after each batch, with the batch's result and the attempts that are finished."""
        self._settings = settings
        self._engine = engine
        self._settled = settled
        self._gather = GATHER if settings.transport_deduplicates else SHORT_GATHER
        self._attempts: list[Attempt] = []
        self._later: set[asyncio.Task[None]] = set()
        """Tasks that pause and then put attempts back into a batch."""
        self._wanted = asyncio.Event()
        self._recorded = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        """Return how many outcomes are not recorded yet."""
        return len(self._attempts) + len(self._later)

    def add(self, attempt: Attempt) -> None:
        """Add an attempt to the next batch."""
        self._attempts.append(attempt)
        self._wanted.set()

    async def keep_up(self) -> None:
        """Wait while more than ``MAX_IN_FLIGHT`` outcomes are unrecorded.

        Further follow-ups begin only after the outcomes of accepted messages have been recorded.
        """
        while len(self._attempts) > self._settings.max_in_flight:
            self._recorded.clear()
            await self._recorded.wait()

    async def run(self) -> None:
        """Record the added attempts; return once `close` has been called and no attempt is left."""
        while not self._closed or self:
            await self._wanted.wait()
            self._wanted.clear()
            if len(self._attempts) < SETTLE_BATCH and not self._closed:
                await asyncio.sleep(self._gather.total_seconds())
            if batch := self._attempts[:SETTLE_BATCH]:
                events.flush()
                await self._record(batch)
                del self._attempts[: len(batch)]
                self._recorded.set()
            if self._attempts:  # attempts were added while the batch was being recorded
                self._wanted.set()

    def close(self) -> None:
        """End `run` once every attempt is recorded; no attempt may be added afterwards."""
        self._closed = True
        self._wanted.set()

    async def _record(self, batch: Sequence[Attempt]) -> None:
        backoff = BACKOFF
        while True:
            try:
                step = await in_loop(self._engine, settle, self._settings, batch)
                break
            except Exception as error:  # noqa: BLE001 - whatever it was, the results must not be lost
                events.failed("settle", error, self._engine.sync_engine)
                # count and log the collected attempts now, because an outage may be long
                events.flush()
                if not is_passing(error):
                    await self._record_apart(batch)
                    return
                await asyncio.sleep(backoff.total_seconds())
                backoff = min(backoff * 2, LONGEST_BACKOFF)
        events.succeeded("settle")
        events.settled(step)
        retry_later = {lease.id for lease in step.retry_later}
        self._settled(step, [attempt for attempt in batch if attempt.begun.lease.id not in retry_later])
        self._add_later([attempt for attempt in batch if attempt.begun.lease.id in retry_later], SETTLE_RETRY_DELAY)

    async def _record_apart(self, batch: Sequence[Attempt]) -> None:
        """Record a rejected batch in smaller parts, so that only the faulty result is delayed."""
        if len(batch) > 1:
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                await self._record(half)
        elif uptime() - batch[0].answered < self._settings.lease.total_seconds():
            self._add_later(batch, LONGEST_BACKOFF)
        else:
            log.error("settle_refused", follow_up_id=str(batch[0].begun.lease.id))
            self._settled(BatchResult(), batch)

    def _add_later(self, attempts: Iterable[Attempt], delay: timedelta) -> None:
        for attempt in attempts:
            task = asyncio.create_task(self._add_after(attempt, delay))
            self._later.add(task)
            task.add_done_callback(self._later.discard)

    async def _add_after(self, attempt: Attempt, delay: timedelta) -> None:
        await asyncio.sleep(delay.total_seconds())
        self.add(attempt)


def settle(engine: Engine, settings: Settings, attempts: Sequence[Attempt]) -> BatchResult:
    """Record the outcomes in one transaction, and unblock the next follow-ups of their chats."""
    policy, deduplicates = settings.retry_policy, settings.transport_deduplicates
    decided = [settlement_of(attempt, policy, deduplicates=deduplicates) for attempt in attempts]
    record = partial(_record, settings, attempts, decided)
    try:
        return transact(engine, partial(record, chat_order.unblock_and_lease))
    except Exception as error:
        if not concerns_a_row(error):
            raise
        # The rejected row may belong to the next follow-up in the same chat. A row that cannot be written must not
        # prevent the accepted follow-up from being recorded.
        return transact(engine, partial(record, chat_order.unblock_writable))


def _record(
    settings: Settings,
    attempts: Sequence[Attempt],
    decided: Sequence[Settlement],
    unblock: Unblock,
    connection: Connection,
) -> BatchResult:
    settled = settlement.settle_if_in_flight(connection, decided, settings.max_lateness)
    missing = _not_among(settled, attempts)
    unrecorded = {lease.id for lease in missing}
    failures = [failure for a in attempts if (failure := failure_of(a)) and failure.follow_up_id not in unrecorded]
    for failure, error in settlement.record_failures(connection, failures):
        events.refused("record", failure.follow_up_id, error)
    ended = [one.id for one in settled if one.status in FINAL]
    unblocked, blocking = unblock(connection, ended, settings.lease)
    in_flight = settlement.still_in_flight(connection, missing) if missing else set()
    return BatchResult(
        settled=tuple(settled),
        stale=len(attempts) - len(settled) - len(in_flight),
        retry_later=tuple(lease for lease in missing if lease.id in in_flight),
        unblocked=tuple(unblocked),
        blocking=tuple(blocking),
    )


def _not_among(settled: Sequence[SettledFollowUp], attempts: Sequence[Attempt]) -> list[Lease]:
    """Return the leases of the attempts whose outcomes were not recorded."""
    if len(settled) == len(attempts):
        return []
    written = {one.id for one in settled}
    return [a.begun.lease for a in attempts if a.begun.lease.id not in written]


def settlement_of(attempt: Attempt, policy: RetryPolicy, *, deduplicates: bool) -> Settlement:
    """Return the settlement of one attempt, derived from the attempt's outcome.

    This function is pure, except that it reads the clock and adds random jitter.
    """
    lease = attempt.begun.lease
    match attempt.outcome:
        case Sent(chat_message_id):
            return Settlement(
                lease,
                Status.SENT,
                chat_message_id=chat_message_id,
                accepted_ago=uptime() - attempt.answered,
                seconds=attempt.seconds,
                cancel_takes_precedence=False,
            )
        case Rejected(detail):
            final = finish(Status.FAILED, ReasonCode.REJECTED, detail)
            return Settlement(lease, final.status, final.reason)
        case Snoozed(_, after):
            delay = spread(after) if after else max(policy.jittered(attempt.begun.snoozes + 1), MIN_RETRY_AFTER)
            return Settlement(lease, Status.PENDING, delay=delay, refunded=True)
        case Retry(detail, after):
            return _try_again(attempt, policy, detail, after)
        case Unknown(detail) if deduplicates:
            return _try_again(attempt, policy, f"{detail[:DETAIL_LENGTH]}{NOT_KNOWN}", None, cancel_detail=NOT_KNOWN)
        case Unknown(detail):
            final = finish(Status.FAILED, ReasonCode.OUTCOME_UNKNOWN, detail)
            return Settlement(lease, final.status, final.reason, cancel_takes_precedence=False)


def _try_again(
    attempt: Attempt, policy: RetryPolicy, detail: str, after: timedelta | None, cancel_detail: str = ""
) -> Settlement:
    lease = attempt.begun.lease
    delay = policy.next_delay(attempt.begun.delivery.attempt)
    if delay is None:
        final = finish(Status.FAILED, ReasonCode.RETRIES_EXHAUSTED, detail)
        return Settlement(lease, final.status, final.reason, cancel_detail=cancel_detail)
    return Settlement(lease, Status.PENDING, delay=spread(after) if after else delay, cancel_detail=cancel_detail)


def failure_of(attempt: Attempt) -> Failure | None:
    """Return the record of a failed attempt, or None if the message was sent."""
    outcome = attempt.outcome
    if isinstance(outcome, Sent):
        return None
    return Failure(
        attempt.begun.lease.id,
        attempt.begun.delivery.attempt,
        OUTCOME_NAMES[type(outcome)],
        outcome.detail,
        outcome.status_code,
        timedelta(seconds=attempt.seconds),
    )

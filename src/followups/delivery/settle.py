"""Settle: decide what each attempt's outcome means (pure), and record a batch of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from followups.database_errors import concerns_a_row
from followups.delivery import events
from followups.delivery.send import OUTCOME_NAMES
from followups.retry import MIN_RETRY_AFTER, spread
from followups.states import FINAL, MAX_REASON_LENGTH, ReasonCode, Status, finish
from followups.store import chat_order, settlement
from followups.store.settlement import Failure, Settled, Settlement
from followups.transactions import transact
from followups.transports.port import Rejected, Retry, Sent, Snoozed, Unknown
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from followups.delivery.send import Attempt
    from followups.retry import RetryPolicy
    from followups.settings import Settings
    from followups.store.chat_order import Unblocked
    from followups.store.leases import Lease

    Unblock = Callable[[Connection, Collection[UUID], timedelta], Unblocked]

NOT_KNOWN = ": the outcome of the attempt in flight is unknown"
ROOM = MAX_REASON_LENGTH - 100
"""Characters left for a detail beside the addition."""


@dataclass(frozen=True, slots=True)
class Settling:
    """The result of settling a batch of attempts."""

    settled: tuple[Settled, ...]
    stale: int
    """Results whose lease another worker had taken over; nothing was written."""
    held: tuple[Attempt, ...]
    """To be settled shortly: another transaction has locked the row."""
    woken: tuple[Lease, ...]
    """Unblocked: each the next of its chat, leased to the caller."""
    locked: tuple[UUID, ...]
    """Ended follow-ups whose next one in the chat is locked by another transaction."""


def settle(engine: Engine, settings: Settings, attempts: Sequence[Attempt]) -> Settling:
    """Record the outcomes in one transaction, and unblock what waited for those that ended."""
    policy, deduplicates = settings.retry_policy, settings.transport_deduplicates
    decided = [decide(attempt, policy, deduplicates=deduplicates) for attempt in attempts]
    record = partial(_record, settings, attempts, decided)
    try:
        return transact(engine, partial(record, chat_order.unblock_and_lease))
    except Exception as error:
        if not concerns_a_row(error):
            raise
        # It may be the next row of a chat, which must not keep the accepted one from being recorded.
        return transact(engine, partial(record, chat_order.unblock_writable))


def _record(
    settings: Settings,
    attempts: Sequence[Attempt],
    decided: Sequence[Settlement],
    unblock: Unblock,
    connection: Connection,
) -> Settling:
    settled = settlement.settle_if_in_flight(connection, decided)
    written = {one.id for one in settled}
    failures = [failure for a in attempts if a.begun.lease.id in written and (failure := failure_of(a))]
    for failure, error in settlement.record_failures(connection, failures):
        events.refused("record", failure.follow_up_id, error)
    ended = [one.id for one in settled if one.status in FINAL]
    unblocked = unblock(connection, ended, settings.lease)
    missing = [a.begun.lease for a in attempts if a.begun.lease.id not in written]
    in_flight = settlement.still_in_flight(connection, missing) if missing else set()
    held = tuple(a for a in attempts if a.begun.lease.id in in_flight)
    return Settling(tuple(settled), len(attempts) - len(settled) - len(held), held, unblocked.leases, unblocked.locked)


def decide(attempt: Attempt, policy: RetryPolicy, *, deduplicates: bool) -> Settlement:
    """Return the settlement of one attempt, by its outcome alone. Pure, apart from clock and jitter."""
    lease = attempt.begun.lease
    match attempt.outcome:
        case Sent(chat_message_id):
            accepted_ago = timedelta(seconds=uptime() - attempt.answered)
            return Settlement(
                lease, Status.SENT, chat_message_id=chat_message_id, accepted_ago=accepted_ago, yields=False
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
            return _try_again(attempt, policy, f"{detail[:ROOM]}{NOT_KNOWN}", None, cancel_detail=NOT_KNOWN)
        case Unknown(detail):
            final = finish(Status.FAILED, ReasonCode.OUTCOME_UNKNOWN, detail)
            return Settlement(lease, final.status, final.reason, yields=False)


def _try_again(
    attempt: Attempt, policy: RetryPolicy, detail: str, after: timedelta | None, cancel_detail: str = ""
) -> Settlement:
    lease = attempt.begun.lease
    delay = policy.next_delay(attempt.begun.attempt)
    if delay is None:
        final = finish(Status.FAILED, ReasonCode.RETRIES_EXHAUSTED, detail)
        return Settlement(lease, final.status, final.reason, cancel_detail=cancel_detail)
    return Settlement(lease, Status.PENDING, delay=spread(after) if after else delay, cancel_detail=cancel_detail)


def failure_of(attempt: Attempt) -> Failure | None:
    """Return the record of an attempt that did not end in sent, or None."""
    outcome = attempt.outcome
    if isinstance(outcome, Sent):
        return None
    return Failure(
        attempt.begun.lease.id,
        attempt.begun.attempt,
        OUTCOME_NAMES[type(outcome)],
        outcome.detail,
        outcome.status_code,
        attempt.duration,
    )

"""Claim: lease the follow-ups that fall due before the next tick, and recover lost leases."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from followups.database import connect_timeout
from followups.delivery import events
from followups.delivery.send import CALL_GRACE
from followups.halving import halve, halve_within
from followups.states import CANCEL_CODES, Final, ReasonCode, Status, finish
from followups.store import chat_order, claims, last_tick, leases, settlement
from followups.store.claims import Claim
from followups.store.last_tick import Rhythm
from followups.transactions import transact
from followups.urls import database_url

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings
    from followups.store.claims import Lost
    from followups.store.leases import Lease

    Take = Callable[[Connection, claims.ClaimSearch], Claim]

MAX_LOSSES = 3
"""A follow-up that has lost this many leases counts as a poison pill."""

AHEAD_TICKS = 2
"""Number of tick intervals that a claim covers, so that one late tick delays no follow-up."""

CLAIM_SIZE = 1000
"""The maximum size of a claim is at least this many rows, unless the in-flight limit is lower."""
LARGEST_CLAIM = 10_000
"""Maximum number of rows in one claim. A claim of the maximum size takes up to 0.2 s. The first rows of a claim are
sent while the next claim runs.
"""


SETTLE_MARGIN = timedelta(seconds=2)
"""Time needed to record an outcome after the database responds again.

This time covers one statement and the longest pause between two tries.
"""


def rhythm_of(settings: Settings) -> Rhythm:
    """Return the longest harmless gap between ticks, and the grace period that follows a longer gap.

    During a longer gap, leases may expire unnoticed. During the grace period, workers can record outcomes under expired
    leases. After an outage, a worker must connect before it can record its outcomes. After the database's clock is set
    forward, calls in flight need this grace period as well. By default, a gap of more than 3 s is followed by a grace
    period of 13 s.
    """
    known_within = max(settings.transport_timeout + CALL_GRACE, _connecting(settings.database_url.get_secret_value()))
    # If ticks are further apart than a lease, leases can expire unnoticed between two ticks.
    longest_gap = min(settings.tick_interval * AHEAD_TICKS + timedelta(seconds=1), settings.lease / 2)
    return Rhythm(longest_gap, known_within + SETTLE_MARGIN)


@lru_cache(maxsize=8)
def _connecting(url: str) -> timedelta:
    """Return the time limit for connecting to the database."""
    return timedelta(seconds=connect_timeout(database_url(url)))


def size_of_claim(window: int) -> int:
    """Return the maximum number of rows per claim: half the in-flight limit, at least `CLAIM_SIZE`.

    Each claim reads all follow-ups in flight. A few large claims therefore cost less than many small ones. While a
    claim runs, workers send the follow-ups of the previous claim.
    """
    return min(window, max(CLAIM_SIZE, window // 2), LARGEST_CLAIM)


def claim(engine: Engine, settings: Settings, since: datetime | None = None, without: tuple[UUID, ...] = ()) -> Claim:
    """Claim due follow-ups in one transaction, but none due before ``since``.

    The follow-ups in ``without`` are skipped.
    """
    return transact(engine, partial(_claim, settings, _search(settings, since, without), claims.claim))


def claim_fairly(
    engine: Engine, settings: Settings, since: datetime | None = None, without: tuple[UUID, ...] = ()
) -> Claim:
    """Claim due follow-ups, starting with the workspaces that have the fewest in flight.

    A fair claim is used after a claim that did not lease all due follow-ups.
    """
    return transact(engine, partial(_claim, settings, _search(settings, since, without), claims.claim_fairly))


def release(engine: Engine, batch: Sequence[Lease]) -> None:
    """Release leases whose attempts will not begin. If a row cannot be written, its lease expires by itself."""
    with engine.begin() as connection:
        halve_within(connection, batch, partial(leases.release_if_not_begun, connection))


def unclaimable(
    engine: Engine, settings: Settings, since: datetime | None, without: tuple[UUID, ...], *, fairly: bool
) -> tuple[UUID, ...]:
    """Return and log the follow-ups that make a claim fail because their rows cannot be written."""
    with engine.connect() as connection:
        ids = claims.candidates(connection, _search(settings, since, without), fairly=fairly)

    def try_to_claim(part: Sequence[UUID]) -> None:
        with engine.connect() as connection:  # the transaction ends without a commit
            _end_lost(connection, claims.try_to_lease(connection, part), settings)

    refused = halve(ids, try_to_claim).refused if ids else []
    for follow_up_id, error in refused:
        events.refused("claim", follow_up_id, error)
    return tuple(follow_up_id for follow_up_id, _ in refused)


def _search(settings: Settings, since: datetime | None, without: tuple[UUID, ...]) -> claims.ClaimSearch:
    return claims.ClaimSearch(
        ahead=settings.tick_interval * AHEAD_TICKS,
        lease=settings.lease,
        window=settings.max_in_flight,
        most=size_of_claim(settings.max_in_flight),
        since=since,
        without=without,
    )


def _claim(settings: Settings, look: claims.ClaimSearch, take: Take, connection: Connection) -> Claim:
    tick = last_tick.begin(connection, rhythm_of(settings))
    if tick is None:
        return Claim((), (), (), more=False, cut_short=False, low_water=look.since, busy=True)
    claimed = take(connection, look._replace(in_grace=tick.in_grace))
    _record_lost(connection, claimed.lost)
    ended = _end_lost(connection, claimed.lost, settings)
    return replace(
        claimed,
        leases=tuple(lease for lease in claimed.leases if lease.id not in ended) if ended else claimed.leases,
        ended=tuple(ended.items()),
        in_grace=tick.in_grace,
    )


def _record_lost(connection: Connection, lost: Sequence[Lost]) -> None:
    failures = [
        settlement.Failure(one.lease.id, one.attempts + 1, "lost", "the worker was lost with the attempt in flight")
        for one in lost
    ]
    for failure, error in settlement.record_failures(connection, failures):
        events.refused("record", failure.follow_up_id, error)


def _end_lost(connection: Connection, lost: Sequence[Lost], settings: Settings) -> dict[UUID, Final]:
    deduplicates = settings.transport_deduplicates
    finals = [
        (one.lease, after_loss(one.lease.losses, one.cancel_requested, deduplicates=deduplicates)) for one in lost
    ]
    ends = [(lease, final) for lease, final in finals if final]
    ended = leases.end_if_not_begun(connection, ends) if ends else set()
    chat_order.unblock(connection, ended)
    return {lease.id: final for lease, final in ends if lease.id in ended}


def after_loss(losses: int, cancel_requested: str | None, *, deduplicates: bool) -> Final | None:
    """Return a follow-up's final state after ``losses`` lost leases, or None if the follow-up is retried.

    >>> after_loss(1, None, deduplicates=True) is None
    True
    >>> after_loss(1, None, deduplicates=False).reason
    'outcome_unknown: the worker was lost with the attempt in flight'
    """
    if not deduplicates:
        return finish(Status.FAILED, ReasonCode.OUTCOME_UNKNOWN, "the worker was lost with the attempt in flight")
    if cancel_requested:
        if cancel_requested not in CANCEL_CODES:
            return finish(Status.CANCELLED, words=cancel_requested)
        detail = "the outcome of the attempt in flight is unknown"
        return finish(Status.CANCELLED, ReasonCode(cancel_requested), detail)
    if losses >= MAX_LOSSES:
        return finish(Status.FAILED, ReasonCode.WORKER_LOST, f"{losses} workers were lost with it in flight")
    return None

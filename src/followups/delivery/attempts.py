"""Values passed between begin, send and settle: begun follow-ups, attempts and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datetime import timedelta
    from uuid import UUID

    from followups.states import Final
    from followups.store.leases import Lease
    from followups.store.settlement import SettledFollowUp
    from followups.transports.port import Delivery, Outcome


class Begun(NamedTuple):
    """A follow-up whose attempt has begun, and the delivery that the transport must send."""

    lease: Lease
    delivery: Delivery
    snoozes: int
    traceparent: str | None = None


class Attempt(NamedTuple):
    """One call of the transport and its outcome. ``answered`` is the `uptime` at which the answer arrived."""

    begun: Begun
    outcome: Outcome
    seconds: float
    """Duration of the call, in seconds."""
    answered: float
    lag: float
    """Seconds from the due date to the answer: the start of the call on the database's clock, plus its duration."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of begin or settle for one batch of follow-ups.

    The result does not list follow-ups that are stale, held, deferred in the database, or waiting for an earlier
    follow-up of their chat.
    """

    begun: tuple[Begun, ...] = ()
    ended: tuple[tuple[UUID, Final], ...] = ()
    """Follow-ups that ended without an attempt."""
    settled: tuple[SettledFollowUp, ...] = ()
    """Follow-ups whose outcomes were recorded."""
    stale: int = 0
    """Number of outcomes not recorded because another worker had taken over the lease."""
    retry_later: tuple[Lease, ...] = ()
    """Follow-ups to try again shortly, because another transaction has locked or just updated their rows."""
    deferred: tuple[tuple[Lease, timedelta], ...] = ()
    """Follow-ups that remain leased, each with the wait that a rate limit requires."""
    unblocked: tuple[Lease, ...] = ()
    """Follow-ups that waited for an ended follow-up and are now leased to the caller."""
    blocking: tuple[UUID, ...] = ()
    """Ended follow-ups whose successor stays blocked, because another transaction has locked it."""

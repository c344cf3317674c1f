"""What begin, send and settle hand to each other: a begun follow-up, its attempt, and what a step made of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datetime import datetime, timedelta
    from uuid import UUID

    from followups.states import Final
    from followups.store.leases import Lease
    from followups.store.settlement import Settled
    from followups.transports.port import Delivery, Outcome


class Begun(NamedTuple):
    """A follow-up whose attempt has begun, with what to send."""

    lease: Lease
    delivery: Delivery
    snoozes: int
    traceparent: str | None = None


class Attempt(NamedTuple):
    """One call of the transport and its outcome; ``answered`` is an `uptime`."""

    begun: Begun
    outcome: Outcome
    duration: timedelta
    answered: float
    answered_at: datetime
    """The same moment by the database's clock."""


@dataclass(frozen=True, slots=True)
class Step:
    """What begin or settle made of a batch.

    Those that are nowhere in it were stale, are held, or wait in their chat's order.
    """

    begun: tuple[Begun, ...] = ()
    ended: tuple[tuple[UUID, Final], ...] = ()
    """Ended without an attempt."""
    settled: tuple[Settled, ...] = ()
    """Their outcomes are recorded."""
    stale: int = 0
    """Outcomes that were not recorded, since another worker had taken over their leases."""
    locked: tuple[Lease, ...] = ()
    """To be tried again shortly, since another transaction has locked their rows."""
    deferred: tuple[tuple[Lease, timedelta], ...] = ()
    """Still leased; each with the time until its turn under a rate limit."""
    unblocked: tuple[Lease, ...] = ()
    """Unblocked by those that ended, each the next of its chat; leased to the caller."""
    blocking: tuple[UUID, ...] = ()
    """Ended follow-ups whose next one in the chat is locked by another transaction."""

"""The model's decisions are made by the package's own functions, with cached results."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING
from uuid import UUID

from followups.delivery.attempts import Attempt, Begun
from followups.delivery.begin import verdict
from followups.delivery.claim import after_loss
from followups.delivery.settle import settlement_of
from followups.retry_policy import RetryPolicy
from followups.states import Status
from followups.store.fragments import OUTCOME_UNKNOWN
from followups.store.leases import Lease
from followups.store.obstacles import Obstacle
from followups.transports.port import Delivery, Rejected, Retry, Sent, Snoozed, Unknown

if TYPE_CHECKING:
    from followups.states import Final
    from followups.store.settlement import Settlement
    from followups.transports.port import Outcome

NOW = datetime(2030, 1, 1, tzinfo=UTC)
ID = UUID(int=1)
LEASE = Lease(ID, 1, NOW)

OUTCOMES: dict[str, Outcome] = {
    "sent": Sent(None),
    "retry": Retry("HTTP 500"),
    "rejected": Rejected("HTTP 403"),
    "snoozed": Snoozed("HTTP 429"),
    "unknown": Unknown("no answer"),
}


@cache
def settlement(outcome: str, attempt: int, most_attempts: int, *, deduplicates: bool) -> Settlement:
    """Return the settlement that `followups.delivery.settle.settlement_of` derives from an attempt's outcome."""
    begun = Begun(LEASE, Delivery(ID, ID, ID, "api", None, ID, "Still there?", NOW, attempt), 0)
    made = Attempt(begun, OUTCOMES[outcome], 0.0, time.monotonic(), 0.0)
    second = timedelta(seconds=1)
    policy = RetryPolicy(max_attempts=most_attempts, base=second, factor=2, cap=second)
    return settlement_of(made, policy, deduplicates=deduplicates)


@cache
def end_before_begin(*, replied: bool) -> Final | None:
    """Return the final state that `followups.delivery.begin.verdict` gives a follow-up that must not begin."""
    return verdict(Obstacle(LEASE, NOW, NOW, NOW, NOW, silence_broken=replied))


@cache
def end_after_loss(losses: int, cancel_requested: str, *, deduplicates: bool) -> Final | None:
    """Return what `followups.delivery.claim.after_loss` decides about a lease lost in flight."""
    return after_loss(losses, cancel_requested or None, deduplicates=deduplicates)


def honest(reason: str | None, status: Status, *, unknown: bool) -> str:
    """Return the reason that the store would write, including the suffix for an unknown outcome."""
    said = reason or ""
    if status is Status.SENT or not unknown or "unknown" in said:
        return said
    return f"{said}: {OUTCOME_UNKNOWN}"

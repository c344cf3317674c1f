"""The log lines and counters of deliveries: one canonical line for each attempt and each transition."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError
from structlog.contextvars import get_contextvars

from followups.database_errors import is_passing, is_read_only, unfit
from followups.delivery.send import OUTCOME_NAMES
from followups.states import FINAL, code_of
from followups.telemetry import metrics, traces
from followups.telemetry.logs import Lines, get_logger
from followups.transports.port import Sent

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.delivery.attempts import Attempt, BatchResult, Begun
    from followups.states import Final
    from followups.store.claims import Claim

log = get_logger(__name__)
lines = Lines(__name__)

# The counters are cached, because looking up a counter takes longer than incrementing it.
_attempts = cache(metrics.ATTEMPTS.labels)


@dataclass(frozen=True, slots=True)
class Outage:
    """An outage: since when (monotonic seconds) and why this process has made no progress."""

    since: float
    why: str


_outages: dict[str, Outage] = {}
"""The current outages, keyed by step and shared by several threads."""

WRITING = frozenset({"claim", "begin", "settle", "release"})
"""Steps that write to the database. A successful write to the database means that the outage has ended. A step that
does not write to the database succeeds even on a read-only server.
"""


def attempted(attempt: Attempt, transport: str) -> None:
    """Log and count one call of the transport.

    The text of the transport's answer is left out, because it may quote the message.
    """
    delivery = attempt.begun.delivery
    outcome = OUTCOME_NAMES[type(attempt.outcome)]
    seconds = attempt.duration.total_seconds()
    # The transport describes an unusual but accepted response without quoting its text.
    odd = {"odd": attempt.outcome.detail} if isinstance(attempt.outcome, Sent) and attempt.outcome.detail else {}
    lag = (attempt.answered_at - delivery.due_date).total_seconds()
    _attempts(transport, outcome).inc()
    metrics.ATTEMPT_DURATION.observe(seconds)
    lines.info(
        "attempt",
        follow_up_id=delivery.follow_up_id,
        chat_id=delivery.chat_id,
        workspace_id=delivery.workspace_id,
        attempt=delivery.attempt,
        outcome=outcome,
        status_code=attempt.outcome.status_code,
        duration_ms=round(seconds * 1000, 2),
        lag_ms=round(lag * 1000, 2),
        task_id=attempt.begun.lease.task_id,
        **odd,
    )


def abandoned(begun: Begun) -> None:
    """Log that an attempt was abandoned: this process was frozen until the lease expired."""
    metrics.STALE_WRITES.inc()
    log.warning("attempt_abandoned", follow_up_id=str(begun.lease.id), attempt=begun.delivery.attempt)


def ended(ends: Iterable[tuple[UUID, Final]]) -> None:
    """Log follow-ups that ended without an attempt."""
    _transitions((follow_up_id, final.status, final.reason) for follow_up_id, final in ends)


def settled(step: BatchResult) -> None:
    """Log the results of a batch of attempts."""
    if step.stale:
        metrics.STALE_WRITES.inc(step.stale)
        log.warning("stale_writes", count=step.stale)
    for one in step.settled:
        if one.lag is not None:
            metrics.LAG.observe(max(one.lag, 0.0))
    _transitions((one.id, one.status, one.reason) for one in step.settled if one.status in FINAL)


def claimed(claim: Claim, seconds: float) -> None:
    """Count a tick, and log the tick if it claimed something."""
    metrics.TICK_DURATION.observe(seconds)
    if claim.traced:
        traces.claimed(claim.traced, seconds)
    ended(claim.ended)
    if claim.lost:
        metrics.LEASES_EXPIRED.inc(len(claim.lost))
        log.warning("leases_expired", count=len(claim.lost))
    if claim.leases:
        metrics.CLAIMED.inc(len(claim.leases))
        log.info("tick", claimed=len(claim.leases), more=claim.more, duration_ms=round(seconds * 1000, 2))


def statistics_refreshed(seconds: float) -> None:
    """Log that the table was analyzed because a claim was slow or large."""
    log.warning("statistics_refreshed", claim_ms=round(seconds * 1000, 2))


def failed(step: str, error: Exception, engine: Engine) -> None:
    """Log that a step failed and will be retried.

    The cause is a bug, or a database that cannot be reached or used.
    """
    why = f"its {step} fails (see its log)"
    if is_passing(error):
        why = "the database is read-only" if is_read_only(error) else "the database is unreachable"
        # The error's text is not logged, because the server's detail may quote a row.
        database = engine.url.render_as_string(hide_password=True)
        log.warning("database_unreachable", step=step, error=type(error).__name__, database=database)
    elif reason := unfit(error):
        log.error("database_refused", step=step, reason=reason)
    elif isinstance(error, DBAPIError):
        diagnosis = getattr(error.orig, "diag", None)
        constraint = getattr(diagnosis, "constraint_name", None)
        sqlstate = getattr(error.orig, "sqlstate", None)
        kind = type(error.orig).__name__
        log.error("step_failed", step=step, error=kind, sqlstate=sqlstate, constraint=constraint)
    else:
        log.error("step_failed", step=step, exc_info=error)
    known = _outages.get(step)
    _outages[step] = Outage(known.since if known else time.monotonic(), why)


def succeeded(step: str) -> None:
    """Record that a step succeeded, which ends the outage of this step.

    A successful write to the database also ends the outages of all other steps.
    """
    if step in WRITING:
        _outages.clear()
    else:
        _outages.pop(step, None)


def outage() -> Outage | None:
    """Return this process's current outage, or None if every step that failed has since succeeded."""
    return min(tuple(_outages.values()), key=lambda one: one.since, default=None)


def refused(step: str, follow_up_id: UUID, error: Exception) -> None:
    """Log that one row made a step fail; the step continues with all other rows."""
    diagnosis = getattr(getattr(error, "orig", None), "diag", None)
    kind = type(getattr(error, "orig", error)).__name__
    constraint = getattr(diagnosis, "constraint_name", None)
    log.error("row_refused", step=step, follow_up_id=str(follow_up_id), error=kind, constraint=constraint)


def clock_off(ahead: float) -> None:
    """Log that this host's clock differs from the database's by too much; only log times are affected."""
    log.warning("clock_off", ahead_s=round(ahead, 1))


def broker_unreachable(step: str, error: Exception) -> None:
    """Log that the broker is unreachable: nothing is lost, but follow-ups may be late."""
    log.warning("broker_unreachable", step=step, error=type(error).__name__)


def _transitions(ends: Iterable[tuple[UUID, str, str | None]]) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    bound = get_contextvars()  # in a web process, the log context of the request
    for follow_up_id, status, reason in ends:
        code = code_of(reason)
        counts[status, code] += 1
        lines.info("transition", **bound | {"follow_up_id": follow_up_id, "status": status, "code": code})
    for labels, number in counts.items():
        metrics.TRANSITIONS.labels(*labels).inc(number)
    lines.flush()

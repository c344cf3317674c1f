"""The log lines and counters of deliveries: one canonical line for each attempt and each transition."""

from __future__ import annotations

import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError
from structlog.contextvars import get_contextvars

from followups.database_errors import is_passing, is_read_only, unfit
from followups.delivery.send import OUTCOME_NAMES
from followups.states import FINAL, code_of
from followups.telemetry import metrics, traces
from followups.telemetry.logs import get_logger, log_batch
from followups.transports.port import Sent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from uuid import UUID

    import prometheus_client
    from sqlalchemy import Engine

    from followups.delivery.attempts import Attempt, BatchResult, Begun
    from followups.states import Final
    from followups.store.claims import Claim
    from followups.telemetry.logs import Line

log = get_logger(__name__)
_attempts: deque[tuple[int, Attempt, str]] = deque()
"""Attempts not yet counted and logged, each with the time of its end (nanoseconds since 1970) and the transport's name.
"""


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
    """Collect one call of the transport; `flush` later counts and logs it.

    With cold caches, a line logged in a batch takes a third of the time. If the process crashes, attempts that were not
    flushed are neither counted nor logged.
    """
    _attempts.append((time.time_ns(), attempt, transport))


def abandoned(begun: Begun) -> None:
    """Log that an attempt was abandoned: this process was frozen until the lease expired."""
    metrics.STALE_WRITES.inc()
    log.warning("attempt_abandoned", follow_up_id=str(begun.lease.id), attempt=begun.delivery.attempt)


def ended(ends: Iterable[tuple[UUID, Final]]) -> None:
    """Count and log follow-ups that ended without an attempt, after the collected attempts."""
    flush((follow_up_id, final.status, final.reason) for follow_up_id, final in ends)


def settled(step: BatchResult) -> None:
    """Count and log the results of a batch of attempts, after the collected attempts."""
    if step.stale:
        metrics.STALE_WRITES.inc(step.stale)
        log.warning("stale_writes", count=step.stale)
    metrics.LAG.observe(*[max(one.lag, 0.0) for one in step.settled if one.lag is not None])
    flush((one.id, one.status, one.reason) for one in step.settled if one.status in FINAL)


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


def flush(ends: Iterable[tuple[UUID, str, str | None]] = ()) -> None:
    """Count and log the collected attempts, and then the ended follow-ups in ``ends``; raise no exception."""
    try:
        _flush(ends)
    except Exception as error:  # noqa: BLE001 - lines that cannot be written must not stop deliveries
        log.error("log_lines_lost", error=type(error).__name__)  # noqa: TRY400 - the error may quote a message


def _flush(ends: Iterable[tuple[UUID, str, str | None]]) -> None:
    batch: dict[str, Iterable[Line]] = {}
    if attempts := list(_collected()):
        metrics.ATTEMPT_DURATION.observe(*[one.seconds for _, one, _ in attempts])
        _count(metrics.ATTEMPTS, [(transport, OUTCOME_NAMES[type(one.outcome)]) for _, one, transport in attempts])
        batch["attempt"] = ((at, _fields(attempt)) for at, attempt, _ in attempts)
    # A status is converted to text, because an enum member takes 1.3 us longer to encode.
    if transitions := [(follow_up_id, str(status), code_of(reason)) for follow_up_id, status, reason in ends]:
        _count(metrics.TRANSITIONS, [(status, code) for _, status, code in transitions])
        bound = get_contextvars()  # in a web process, the log context of the request
        now = time.time_ns()
        batch["transition"] = (
            (now, {**bound, "follow_up_id": follow_up_id, "status": status, "code": code})
            for follow_up_id, status, code in transitions
        )
    log_batch(__name__, batch)


def _collected() -> Iterator[tuple[int, Attempt, str]]:
    with suppress(IndexError):  # the end; checking the length first would be a race with other threads
        while True:
            yield _attempts.popleft()


def _count(counter: prometheus_client.Counter, labels: Iterable[tuple[str, str]]) -> None:
    for each, number in Counter(labels).items():
        counter.labels(*each).inc(number)


def _fields(attempt: Attempt) -> dict[str, object]:
    """Return an attempt's log fields.

    The text of the transport's answer is left out, because it may quote the message.
    """
    delivery, outcome = attempt.begun.delivery, attempt.outcome
    # If the message was accepted with an unusual answer, the detail describes the answer without quoting it.
    odd = {"odd": outcome.detail} if isinstance(outcome, Sent) and outcome.detail else {}
    return {
        "follow_up_id": delivery.follow_up_id,
        "chat_id": delivery.chat_id,
        "workspace_id": delivery.workspace_id,
        "attempt": delivery.attempt,
        "outcome": OUTCOME_NAMES[type(outcome)],
        "status_code": outcome.status_code,
        "duration_ms": round(attempt.seconds * 1000, 2),
        "lag_ms": round(attempt.lag * 1000, 2),
        "task_id": attempt.begun.lease.task_id,
        **odd,
    }

"""The checks of ``followups doctor`` for passing problems: in the database, in the broker, and by this host's clock.

A finding with advice needs action now; anything else is only mentioned in the detail.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import redis
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from followups.cli.connection import broker_client
from followups.cli.doctor.checks import PATIENCE, Finding
from followups.cli.times import span
from followups.database import takes_changes
from followups.delivery.breaker import CLOSED
from followups.flow_control.breaker import read
from followups.store import backlog, pauses
from followups.worker.queues import DELIVER, DISPATCH

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings

LONG_TRANSACTION = timedelta(minutes=10)
"""Age from which a transaction is reported. Ours take milliseconds; a long one keeps dead rows and slows the claim."""

CLOCK_OFF = timedelta(seconds=1)

UNREAD_TICKS = 100
"""Ticks in the queue from which it seems that no worker reads it."""

LATEST = 10_000
"""Newest failed attempts to look at; the table may be large."""

_ATTEMPTS = text(f"""
    SELECT outcome, count(*) AS number
      FROM (SELECT outcome, at FROM failed_attempts ORDER BY id DESC LIMIT {LATEST}) AS latest
     WHERE at > now() - interval '1 hour'
     GROUP BY outcome ORDER BY outcome
""")  # noqa: S608 - no input, only the constant above
_OLDEST_TRANSACTION = text("""
    SELECT pid, application_name, now() - xact_start AS age FROM pg_stat_activity
     WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()
       AND backend_type = 'client backend'
     ORDER BY xact_start LIMIT 1
""")
_ROLE_WITHOUT_SIGHT = text("""
    SELECT current_user FROM pg_stat_activity
     WHERE datname = current_database() AND query = '<insufficient privilege>' LIMIT 1
""")
_DEAD = text("""
    SELECT n_dead_tup AS dead, n_live_tup AS live FROM pg_stat_user_tables WHERE relid = 'follow_ups'::regclass
""")

EXPLAINED = {
    "lost": "lost with their workers (look for crashes, and for the kernel's OOM killer)",
    "unknown": "without an answer (look at the network to the transport, and at its timeout)",
    "retry": "refused for now",
    "snoozed": "put off by the transport's rate limit",
    "rejected": "refused for good",
}
"""The meaning of each outcome of a failed attempt."""


def of_database(settings: Settings, engine: Engine) -> Iterator[Finding]:
    """Check what waits, what failed lately, and what slows the database.

    Yields nothing if the database is unreachable or read-only.
    """
    try:
        with engine.connect() as connection:
            if not takes_changes(connection):
                return  # reported by another check, and more workers would not help
            yield _backlog(settings, backlog.measure(connection, window=settings.max_in_flight))
            yield _attempts(connection)
            yield _held(connection)
            yield _transactions(connection)
            yield _clock(connection)
    except SQLAlchemyError:
        return  # reported by another check


def of_broker(settings: Settings) -> Iterator[Finding]:
    """Check for unread messages, and whether the breaker is open."""
    try:
        with broker_client(settings, PATIENCE) as client:
            yield _queues(settings, client)
            yield _breaker(settings, client)
    except (redis.RedisError, OSError) as error:
        yield Finding("queues", type(error).__name__, "See to the broker first.")


def _breaker(settings: Settings, client: redis.Redis) -> Finding:
    shown = read(client, settings)
    if shown.state == CLOSED:
        return Finding("breaker", "closed: everything that is due may begin")
    whom = f"{len(shown.held)} workspace{'' if len(shown.held) == 1 else 's'}"
    detail = f"{shown.state} for {span(timedelta(seconds=shown.seconds))}: the transport failed for all of {whom}"
    if shown.state == "recovering":
        return Finding("breaker", f"{detail}, and takes more from second to second now")
    advice = "See to the chat server. It is probed every few seconds; what is due waits, and goes out by itself."
    return Finding("breaker", detail, advice)


def _queues(settings: Settings, client: redis.Redis) -> Finding:
    batches, unread = (int(client.llen(f"{settings.broker_prefix}{name}")) for name in (DELIVER, DISPATCH))
    detail = f"{batches} batches in {DELIVER}, {unread} ticks in {DISPATCH}"
    # Every hint in the queue stands for a lease, so those beyond MAX_IN_FLIGHT must be stale.
    if unread > UNREAD_TICKS or batches > 2 * max(settings.max_in_flight // settings.batch_size, 1):
        return Finding("queues", detail, "Nobody reads them: start workers, or restart those that only seem to run.")
    return Finding("queues", detail)


def _backlog(settings: Settings, found: backlog.Backlog) -> Finding:
    oldest = timedelta(seconds=found.oldest_overdue)
    detail = f"{found.pending} pending, {found.in_flight} in flight, {found.overdue} overdue"
    detail += f", the oldest by {span(oldest)}" if found.overdue else ""
    if oldest <= settings.lease + settings.tick_interval:
        return Finding("backlog", detail)
    advice = "Less is sent than falls due: see followups stats and the transport's answers; start more workers."
    return Finding("backlog", detail, advice)


def _attempts(connection: Connection) -> Finding:
    rows = connection.execute(_ATTEMPTS).all()
    told = ", ".join(f"{row.number} {EXPLAINED.get(row.outcome, row.outcome)}" for row in rows)
    return Finding("attempts", f"failed in the last hour: {told or 'none'}")


def _held(connection: Connection) -> Finding:
    standing = pauses.standing(connection)
    if not standing:
        return Finding("pauses", "nothing is paused")
    held = sum(each.held for each in standing)
    return Finding("pauses", f"{len(standing)}, which hold {held}: followups pause --list")


def _transactions(connection: Connection) -> Finding:
    dead = connection.execute(_DEAD).one()
    rows = f"{dead.dead} dead rows beside {dead.live}"
    oldest = connection.execute(_OLDEST_TRANSACTION).one_or_none()
    if oldest is None or oldest.age < LONG_TRANSACTION:
        return Finding("transactions", f"none open for long, {rows}{_hidden(connection)}")
    detail = f"one is open for {span(oldest.age)} (pid {oldest.pid}, {oldest.application_name or 'no name'}), {rows}"
    return Finding("transactions", detail, f"It keeps dead rows: end it, SELECT pg_terminate_backend({oldest.pid}).")


def _hidden(connection: Connection) -> str:
    role = connection.scalar(_ROLE_WITHOUT_SIGHT)
    return f"; those of other roles are hidden (GRANT pg_read_all_stats TO {role} shows them)" if role else ""


def _clock(connection: Connection) -> Finding:
    before = datetime.now(UTC)
    theirs: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    off = before + (datetime.now(UTC) - before) / 2 - theirs
    if abs(off) <= CLOCK_OFF:
        return Finding("clock", "this host's agrees with the database's")
    where = "ahead of" if off > timedelta(0) else "behind"
    detail = f"this host's is {span(abs(off))} {where} the database's; follow-ups go by the database's"
    return Finding("clock", detail, "Correct this host's clock: its logs tell wrong times.")

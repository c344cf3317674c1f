"""Dispatcher ticks: which dispatcher may claim now, and when the last tick ran.

Dispatchers cannot see each other's ticks. They therefore share one database row, which holds the last tick's time and
serves as the claim lock. Only one dispatcher at a time may count the follow-ups in flight and claim more.

A long gap between ticks means that there was an outage, or that the database's clock was set forward. During such a
gap, leases expire although their workers may still be running. Workers therefore get a grace period to record the
outcomes of their attempts in flight. Until the grace period ends, the leases of attempts in flight are not claimed
again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.event_loop import driver_rows
from followups.statements import Statement

if TYPE_CHECKING:
    from sqlalchemy import Connection

FROZEN_AFTER = "3s"
"""How long a dispatcher's session may be idle during a claim before PostgreSQL ends the session. A frozen dispatcher
with an open session keeps all other dispatchers from claiming.
"""

STALE_TICKS = 5
STALE_AT_LEAST = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Rhythm:
    """The longest normal gap between two ticks, and the grace period that follows a longer gap."""

    longest_gap: timedelta
    grace: timedelta


@dataclass(frozen=True, slots=True)
class Tick:
    """A dispatcher tick in progress; the next tick runs only after this tick's transaction."""

    in_grace: bool
    """Whether workers may still settle attempts whose leases have expired."""


# Ticks are recorded at most five times a second: each update leaves a dead row. A recorded time in the future means
# that the clock was set back. A recorded time less than a second ahead only means that two transactions began in the
# opposite order. During a grace period, a short gap between ticks does not start another grace period. If it did, no
# expired lease would ever be taken over on a machine where every tick is late.
_BEGIN = Statement("""
    WITH state AS MATERIALIZED (
        SELECT id, last_tick_at,
               last_tick_at < now() - CAST(:longest_gap AS interval)
                   AND (grace_until IS NULL OR grace_until <= last_tick_at
                        OR last_tick_at < now() - CAST(:grace AS interval)) AS gap,
               grace_until > now() AND grace_until <= now() + CAST(:grace AS interval) AS in_grace,
               set_config('idle_in_transaction_session_timeout', :frozen_after, true)
          FROM dispatcher_state
           FOR NO KEY UPDATE SKIP LOCKED
    ), recorded AS (
        UPDATE dispatcher_state d
           SET last_tick_at = now(),
               grace_until = CASE WHEN state.gap THEN now() + CAST(:grace AS interval) ELSE d.grace_until END
          FROM state
         WHERE d.id = state.id
           AND (state.last_tick_at IS NULL
                OR state.last_tick_at NOT BETWEEN now() - interval '200 ms' AND now() + interval '1 s')
    )
    SELECT COALESCE(gap OR in_grace, false) AS in_grace FROM state
""")
_INSERT = text("INSERT INTO dispatcher_state DEFAULT VALUES ON CONFLICT DO NOTHING")
_AGE = text("SELECT GREATEST(now(), last_tick_at) - last_tick_at FROM dispatcher_state")
_LAST = text("SELECT COALESCE(EXTRACT(EPOCH FROM last_tick_at), 0) FROM dispatcher_state")


def begin(connection: Connection, rhythm: Rhythm) -> Tick | None:
    """Record a tick, and prevent other dispatchers from claiming until the end of the transaction.

    Returns None if another dispatcher is claiming. If the result is None, the caller must not claim, but should soon
    try to begin another tick.
    """
    parameters = {"longest_gap": rhythm.longest_gap, "grace": rhythm.grace, "frozen_after": FROZEN_AFTER}
    rows = driver_rows(connection, _BEGIN, parameters)
    return Tick(*rows[0]) if rows else None


def ensure_recordable(connection: Connection) -> None:
    """Insert the row that records ticks if it is missing; without this row, nothing is claimed."""
    connection.execute(_INSERT)


def last_tick_age(connection: Connection) -> timedelta | None:
    """Return the time since the last tick, or None if no tick has ever run."""
    age: timedelta | None = connection.scalar(_AGE)
    return age


def last_tick(connection: Connection) -> float:
    """Return the last tick's time in seconds since 1970, or 0 if no tick has run yet."""
    return float(connection.scalar(_LAST) or 0)


def stale_after(interval: timedelta) -> timedelta:
    """Return the age from which the last tick counts as stale. A restart of beat takes less time."""
    return max(STALE_TICKS * interval, STALE_AT_LEAST)

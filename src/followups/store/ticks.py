"""Ticks: one dispatcher claims at a time, and each claim learns whether any dispatcher has ticked lately.

Both are in one row, since both are questions to the database. A dispatcher knows nothing of the ticks of the others,
and the window of what may be in flight is only kept when no two of them count it at the same time.

Ticks that stopped for a while mean an outage, or that the database's clock was set forward. Either way leases have
ended that no tick could see ending, while their workers may live and know the outcomes. So for a grace period leases
with an attempt in flight are left to their workers, which record the outcomes meanwhile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from datetime import timedelta

    from sqlalchemy import Connection

FROZEN_AFTER = "3s"
"""How long a dispatcher may pause within its claim. One that is frozen there would keep all others from claiming;
PostgreSQL then ends its session."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """What is normal between two ticks, and what follows a longer gap."""

    longest_gap: timedelta
    grace: timedelta


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick under way, which no other dispatcher's overlaps until its transaction ends."""

    in_grace: bool
    """Leases with an attempt in flight are not taken over yet."""


# Recorded at most five times a second: each record leaves a dead row behind. Times too far in the future are of a
# clock that was set back since. Whether two transactions began a moment apart in the other order is no such case.
# A gap that is shorter than a grace, and began within one, begins no other: on a starved machine, where every tick is
# late, nothing would ever be taken over.
_BEGIN = text("""
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
    """Record a tick and keep other dispatchers from claiming until the end of the transaction.

    None if another dispatcher is claiming: then this one must not, and tries again shortly.
    """
    row = connection.execute(_BEGIN, asdict(rhythm) | {"frozen_after": FROZEN_AFTER}).one_or_none()
    return Tick(row.in_grace) if row else None


def ensure_recordable(connection: Connection) -> None:
    """Insert the row in which ticks are recorded, if an operator has deleted it: nothing is claimed without it."""
    connection.execute(_INSERT)


def last_tick_age(connection: Connection) -> timedelta | None:
    """Return how long ago the last tick ran, or None if none ever did."""
    age: timedelta | None = connection.scalar(_AGE)
    return age


def last_tick(connection: Connection) -> float:
    """Return when the last tick ran, in seconds since 1970, or 0 if none ever did."""
    return float(connection.scalar(_LAST) or 0)

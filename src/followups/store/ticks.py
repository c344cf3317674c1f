"""When the dispatcher last ticked: one row, for health checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from datetime import timedelta

    from sqlalchemy import Connection

# At most once in a fifth of a second, and never waiting: two dispatchers must not queue up behind one row.
_RECORD = text("""
    UPDATE dispatcher_state SET last_tick_at = now()
     WHERE id = (SELECT id FROM dispatcher_state
                  WHERE last_tick_at IS NULL OR last_tick_at < now() - interval '200 ms'
                    FOR UPDATE SKIP LOCKED)
""")
_AGE = text("SELECT now() - last_tick_at FROM dispatcher_state")
_LAST = text("SELECT COALESCE(EXTRACT(EPOCH FROM last_tick_at), 0) FROM dispatcher_state")


def record(connection: Connection) -> None:
    """Note that a tick runs now."""
    connection.execute(_RECORD)


def last_tick_age(connection: Connection) -> timedelta | None:
    """Return how long ago the last tick ran; None when none ever did."""
    age: timedelta | None = connection.scalar(_AGE)
    return age


def last_tick(connection: Connection) -> float:
    """Return when the last tick ran, in seconds since 1970; 0 when none ever did."""
    return float(connection.scalar(_LAST) or 0)

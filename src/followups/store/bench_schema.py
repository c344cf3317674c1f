"""The benchmark's own schema in the configured database, and the follow-ups to send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import Connection

PREFIX = "followups_bench_"
"""Prefix of the names of benchmark schemas."""

_LEFT = text("SELECT nspname FROM pg_namespace WHERE starts_with(nspname, :prefix)")
_LOCK = text("SELECT pg_try_advisory_lock(hashtext(:name))")
_UNLOCK = text("SELECT pg_advisory_unlock(hashtext(:name))")


def create_schema(connection: Connection, name: str) -> None:
    """Create a schema and lock its name; drop schemas that killed benchmarks have left behind."""
    for left in connection.scalars(_LEFT, {"prefix": PREFIX}).all():
        if connection.scalar(_LOCK, {"name": left}):
            drop_schema(connection, left)
    connection.execute(_LOCK, {"name": name})
    connection.execute(text(f"CREATE SCHEMA {_checked(name)}"))
    connection.commit()


def drop_schema(connection: Connection, name: str) -> None:
    """Drop a schema with everything in it."""
    connection.rollback()
    connection.execute(text(f"DROP SCHEMA IF EXISTS {_checked(name)} CASCADE"))
    connection.execute(_UNLOCK, {"name": name})
    connection.commit()


def _checked(name: str) -> str:
    if not name.startswith(PREFIX) or not name.isidentifier():
        message = f"{name} is not the schema of a benchmark"
        raise ValueError(message)
    return name


_FILL = text("""
    WITH chat AS (
        INSERT INTO chats (workspace_id, id, last_message_id, last_message_role, last_message_at)
        SELECT :workspace_id, gen_random_uuid(), gen_random_uuid(), 'agent', now() FROM generate_series(1, :count)
        RETURNING workspace_id, id, last_message_id
    )
    INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id)
    SELECT workspace_id, id, 'Are you still there?',
           now() + CAST(:ahead AS interval) + random() * CAST(:span AS interval), last_message_id
      FROM chat
    RETURNING id
""")
_RELEASE = text(
    "UPDATE follow_ups SET due_date = now(), scheduled_at = now() WHERE status = 'pending' AND id = ANY(:ids)"
)


def fill(connection: Connection, workspace_id: UUID, count: int, ahead: object, span: object) -> list[UUID]:
    """Insert follow-ups, each in a chat of its own; return their ids.

    The due dates are spread at random over ``span``, which begins ``ahead`` from now.
    """
    parameters = {"workspace_id": workspace_id, "count": count, "ahead": ahead, "span": span}
    return list(connection.scalars(_FILL, parameters))


def release(connection: Connection, ids: Sequence[UUID]) -> None:
    """Make these follow-ups due now."""
    connection.execute(_RELEASE, {"ids": list(ids)})


@dataclass(frozen=True, slots=True)
class Outcome:
    """A benchmark's result. Times are in seconds, and lags in milliseconds (None if nothing was sent)."""

    sent: int
    pending: int
    seconds: float | None
    """Time from the first due date to the last follow-up that was accepted, in seconds."""
    early: int
    p50: float | None
    p95: float | None
    p99: float | None
    most: float | None


_OUTCOME = text("""
    SELECT count(*) FILTER (WHERE status = 'sent') AS sent, count(*) FILTER (WHERE status = 'pending') AS pending,
           CAST(extract(epoch FROM max(accepted_at) - min(due_date)) AS float) AS seconds,
           count(*) FILTER (WHERE accepted_at < due_date) AS early,
           CAST(percentile_disc(0.5) WITHIN GROUP (ORDER BY lag) AS float) AS p50,
           CAST(percentile_disc(0.95) WITHIN GROUP (ORDER BY lag) AS float) AS p95,
           CAST(percentile_disc(0.99) WITHIN GROUP (ORDER BY lag) AS float) AS p99,
           CAST(max(lag) AS float) AS most
      FROM (SELECT status, due_date, accepted_at, 1000 * extract(epoch FROM accepted_at - due_date) AS lag
              FROM follow_ups WHERE id = ANY(:ids)) f
""")


def outcome(connection: Connection, ids: Sequence[UUID]) -> Outcome:
    """Return the benchmark's result so far."""
    return Outcome(*connection.execute(_OUTCOME, {"ids": list(ids)}).one())

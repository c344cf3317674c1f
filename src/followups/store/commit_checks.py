"""Finds out from the written rows whether a commit without a response succeeded.

A lease is recognised by its fencing token. Other changes are recognised by the new timestamp in the row. Rows store
times with a precision of one microsecond. No two transactions write the same row in the same microsecond.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.transactions import ask_if_lost

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection, TextClause

SAMPLE = 10
"""The largest number of rows that are read again after a commit whose result is unknown. A small sample is enough,
since a transaction is committed as a whole. A single row is not enough, because another transaction may have changed
that row in the meantime.
"""

# If the server process survived the lost connection, its transaction may still hold the row's lock. FOR SHARE reads the
# latest version of the row, but raises an error on a standby.
_ROW = "CROSS JOIN LATERAL (SELECT f.* FROM follow_ups f WHERE f.id = b.id FOR SHARE SKIP LOCKED) f"
_LEASED = text(f"""
    SELECT f.lease_token = b.token
      FROM unnest(CAST(:ids AS uuid[]), CAST(:marks AS bigint[])) AS b(id, token) {_ROW}
""")  # noqa: S608 - no input, only the constant above
_WRITTEN = text(f"""
    SELECT b.moment IN (f.begun_at, f.finished_at, f.next_attempt_at)
      FROM unnest(CAST(:ids AS uuid[]), CAST(:marks AS timestamptz[])) AS b(id, moment) {_ROW}
""")  # noqa: S608 - no input, only the constant above


def by_token(connection: Connection, tokens: Iterable[tuple[UUID, int]]) -> None:
    """Register the new lease tokens, which show later whether a commit without a response succeeded."""
    ask_if_lost(connection, partial(_still_written, _LEASED, list(islice(tokens, SAMPLE))))


def by_time(connection: Connection, moments: Iterable[tuple[UUID, datetime]]) -> None:
    """Register the times written to the rows, so that a commit can be checked if its response is lost."""
    ask_if_lost(connection, partial(_still_written, _WRITTEN, list(islice(moments, SAMPLE))))


def _still_written(query: TextClause, rows: list[tuple[UUID, int | datetime]], connection: Connection) -> bool | None:
    """Return whether any row still has the written values, or None if all rows are locked."""
    parameters = {"ids": [row_id for row_id, _ in rows], "marks": [mark for _, mark in rows]}
    found = list(connection.scalars(query, parameters))
    return any(found) if found else None

"""What a statement leaves in the rows that it writes, read back when the answer to its commit is lost.

A lease is known by its token. Everything else is known by its moment: a row has it to the microsecond, and no two
transactions write the same row at the same one.
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
"""Rows that are read back at most: a transaction is committed as a whole, and some may have gone on since."""

# A row that is locked may be so by the very transaction that is asked about: its backend has not ended yet, though the
# connection has. The lock is also what makes the latest version of the row count, and what a standby refuses.
_ROW = "CROSS JOIN LATERAL (SELECT f.* FROM follow_ups f WHERE f.id = b.id FOR SHARE SKIP LOCKED) f"
_LEASED = text(f"""
    SELECT f.lease_token = b.token
      FROM unnest(CAST(:ids AS uuid[]), CAST(:marks AS bigint[])) AS b(id, token) {_ROW}
""")  # noqa: S608 - no input, only the constant above
_WRITTEN = text(f"""
    SELECT b.moment IN (f.begun_at, f.finished_at, f.next_attempt_at)
      FROM unnest(CAST(:ids AS uuid[]), CAST(:marks AS timestamptz[])) AS b(id, moment) {_ROW}
""")  # noqa: S608 - no input, only the constant above


def leased(connection: Connection, tokens: Iterable[tuple[UUID, int]]) -> None:
    """Let a lost commit be known by the tokens that these rows were leased with."""
    ask_if_lost(connection, partial(_stand, _LEASED, list(islice(tokens, SAMPLE))))


def written(connection: Connection, moments: Iterable[tuple[UUID, datetime]]) -> None:
    """Let a lost commit be known by the moments at which these rows were begun or finished, or are tried again."""
    ask_if_lost(connection, partial(_stand, _WRITTEN, list(islice(moments, SAMPLE))))


def _stand(query: TextClause, rows: list[tuple[UUID, int | datetime]], connection: Connection) -> bool | None:
    """Return whether any of the rows stands as it was left; None while all of them are locked."""
    parameters = {"ids": [row_id for row_id, _ in rows], "marks": [mark for _, mark in rows]}
    found = list(connection.scalars(query, parameters))
    return any(found) if found else None

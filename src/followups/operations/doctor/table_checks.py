"""Checks of tables for rows that other programs or manual changes have made invalid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import CheckConstraint, text
from sqlalchemy.exc import SQLAlchemyError

from followups.models import Base
from followups.operations.doctor import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

_VALID = text(
    "SELECT conname FROM pg_constraint WHERE contype = 'c' AND convalidated AND conrelid = to_regclass(:name)"
)
_BEHIND = text("""
    SELECT COALESCE(max(id), 0) > COALESCE(pg_sequence_last_value(pg_get_serial_sequence('failed_attempts', 'id')), 0)
      FROM failed_attempts
""")
RUN = "run as the tables' owner"
SHOWN = 3
"""Maximum number of rows named in a finding."""


def of_tables(engine: Engine) -> Iterator[Finding]:
    """Find rows that cannot be read, and sequences whose next id is already in use.

    Yields nothing if there are no such rows or ids.
    """
    try:
        with engine.connect() as connection:
            for table, name, condition in _checks():
                if name not in set(connection.scalars(_VALID, {"name": table})):
                    yield _unguarded(connection, table, name, condition)
            if connection.scalar(_BEHIND):
                yield _behind()
    except SQLAlchemyError:
        return  # another check reports this problem


def _checks() -> Iterator[tuple[str, str, str]]:
    for table in Base.metadata.sorted_tables:
        for constraint in table.constraints:
            if isinstance(constraint, CheckConstraint):
                yield table.name, str(constraint.name), str(constraint.sqltext)


def _unguarded(connection: Connection, table: str, name: str, condition: str) -> Finding:
    """Return a finding about a missing constraint, which lists violating rows and says how to restore it."""
    keys = ", ".join(f"{column.name}::text" for column in Base.metadata.tables[table].primary_key)
    query = text(f"SELECT concat_ws(' ', {keys}) FROM {table} WHERE NOT ({condition}) LIMIT {SHOWN}")  # noqa: S608 - no input
    rows = list(connection.scalars(query))
    detail = f"{table} has no valid constraint {name}"
    add = (
        f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID;"
        f" ALTER TABLE {table} VALIDATE CONSTRAINT {name}"
    )
    if rows:
        found = f"{detail}; rows that break it: {', '.join(rows)}{' ...' if len(rows) == SHOWN else ''}"
        return Finding("rows", found, f"Correct these rows, which may never be sent. Then {RUN}: {add}")
    return Finding("rows", detail, f"{RUN.capitalize()}: {add}")


def _behind() -> Finding:
    detail = "the next ids of failed_attempts are already used, as after a logical replication or a restore"
    advice = "SELECT setval(pg_get_serial_sequence('failed_attempts', 'id'), max(id)) FROM failed_attempts"
    return Finding("ids", detail, f"Failed attempts are not recorded. {RUN.capitalize()}: {advice}")

"""What the planner believes of the table, brought up to date.

Autovacuum does it within minutes. Until then, a table that was emptied and vacuumed, and then filled in a burst,
counts as one row: any index that holds the id serves as well as the primary key, and some are read to their end for
each row. Measured with 50,000 due in such a table: claim, begin and settle of a batch took seconds each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy import Engine

# What has locked the table, a VACUUM or the like, tells the planner more than this would.
_ANALYZE = text("ANALYZE (SKIP_LOCKED) follow_ups")
_COUNTED = text("SELECT reltuples FROM pg_class WHERE oid = 'follow_ups'::regclass")


def counts_as_less_than(engine: Engine, number: int) -> bool:
    """Say whether the planner takes the table for smaller than that. Of a new one it judges by its size, and well."""
    with engine.connect() as connection:
        return bool(0 <= connection.execute(_COUNTED).scalar_one() < number)


def refresh(engine: Engine) -> None:
    """Analyze the table of follow-ups: some 30,000 rows are read, nobody waits. Raises what the database raises."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(_ANALYZE)

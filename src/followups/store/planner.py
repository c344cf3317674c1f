"""Updates of the planner's statistics for the table of follow-ups.

Autovacuum updates the statistics within minutes. Until then, the planner estimates one row for a table that was
emptied, vacuumed, and then filled in a burst. The planner then rates any index that contains the id as highly as the
primary key, although some of these indexes are scanned completely for each row. With 50,000 due follow-ups in such a
table, the claim, begin and settle of one batch took seconds each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy import Engine

# If VACUUM or a similar command has locked the table, that command updates the statistics.
_ANALYZE = text("ANALYZE (SKIP_LOCKED) follow_ups")
_COUNTED = text("SELECT reltuples FROM pg_class WHERE oid = 'follow_ups'::regclass")


def counts_as_less_than(engine: Engine, number: int) -> bool:
    """Return whether the planner's estimate of the table is below this number of rows.

    The estimate is good even for a new table, because it is based on the table's size.
    """
    with engine.connect() as connection:
        return bool(0 <= connection.execute(_COUNTED).scalar_one() < number)


def refresh(engine: Engine) -> None:
    """Run ANALYZE on the table of follow-ups, which reads some 30,000 rows and blocks nothing.

    Raises database errors.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(_ANALYZE)

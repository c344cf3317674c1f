"""Add a column for lateness after a hold, and constraints that reject times Python cannot read.

If existing rows violate a constraint, the constraint is not added. With the constraint, every change to a violating row
would fail, including a claim. ``followups doctor`` lists the violating rows and shows the statement that adds the
constraint.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import text

revision = "0009"
down_revision = "0008"

LOCK_TIMEOUT = "2s"


def _readable(*columns: str) -> str:
    named = ", ".join(columns)
    return (
        f"LEAST({named}) >= '0002-01-01 00:00:00+00'::timestamptz"
        f" AND GREATEST({named}) < '9999-01-01 00:00:00+00'::timestamptz"
    )


TIMES = (
    "scheduled_at", "next_attempt_at", "lease_until", "begun_at", "accepted_at", "held_until", "sendable_from",
    "limited_until",
)  # fmt: skip
CHECKS = {
    "follow_ups": _readable(*TIMES),
    "chats": _readable("last_message_at", "last_user_message_at"),
    "sending_hours": (f"opening < '24:00:00' AND closing < '24:00:00' AND {_readable('open_from', 'open_until')}"),
}


def upgrade() -> None:
    """Add the column first, then each constraint in two short steps.

    The column has no default, so no row is rewritten. While a constraint is validated, other transactions can read and
    write the rows.
    """
    op.execute("ALTER TABLE follow_ups ADD COLUMN IF NOT EXISTS sendable_from timestamptz")
    with op.get_context().autocommit_block():
        for table, check in CHECKS.items():
            name = f"ck_{table}_times_are_readable"
            # an interrupted run may have left this constraint behind
            _alter(f"{table} DROP CONSTRAINT IF EXISTS {name}")
            if not op.get_bind().scalar(text(f"SELECT EXISTS (SELECT FROM {table} WHERE NOT ({check}))")):  # noqa: S608
                _alter(f"{table} ADD CONSTRAINT {name} CHECK ({check}) NOT VALID")
                op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")


def _alter(change: str) -> None:
    # This statement runs outside the migration's transaction, so it needs its own lock timeout. `env` sets its lock
    # timeout only for the migration's transaction. While this statement waits for its lock, other access to the table
    # waits too.
    op.get_bind().exec_driver_sql(f"BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; ALTER TABLE {change}; COMMIT")


def downgrade() -> None:
    """Drop the constraints and the column."""
    for table in CHECKS:
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS ck_{table}_times_are_readable")
    op.drop_column("follow_ups", "sendable_from")

"""Add the end of the grace period for leases with an attempt in flight.

The grace period begins after a gap between ticks.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the column. The column is nullable and has no default, so no row is rewritten."""
    op.add_column("dispatcher_state", sa.Column("grace_until", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("dispatcher_state", "grace_until")

"""Add a column for the end of the grace period that follows a gap between two ticks.

During the grace period, workers may still settle attempts whose leases have expired.
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

"""Add columns for the duration of the accepted attempt and for the API key of the create request."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Add the columns. The columns are nullable and have no default, so no row is rewritten."""
    op.add_column("follow_ups", sa.Column("accepted_duration", sa.Interval(), nullable=True))
    op.add_column("follow_ups", sa.Column("created_by_key", sa.Uuid(), nullable=True))


def downgrade() -> None:
    """Drop the columns."""
    op.drop_column("follow_ups", "created_by_key")
    op.drop_column("follow_ups", "accepted_duration")

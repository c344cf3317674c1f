"""Add a column for the trace in which a follow-up was created, so that attempts can join the trace."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column. The column is nullable and has no default, so no row is rewritten."""
    op.add_column("follow_ups", sa.Column("traceparent", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("follow_ups", "traceparent")

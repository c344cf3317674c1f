"""In which trace a follow-up was created, so that its attempts are part of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column; being nullable and without a default, that rewrites no row."""
    op.add_column("follow_ups", sa.Column("traceparent", sa.Text(), nullable=True))


def downgrade() -> None:
    """Take it back."""
    op.drop_column("follow_ups", "traceparent")

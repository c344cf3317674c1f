"""How long the accepted attempt took, and the key that created a follow-up."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Add the columns, which rewrites no row, being nullable and without a default."""
    op.add_column("follow_ups", sa.Column("accepted_duration", sa.Interval(), nullable=True))
    op.add_column("follow_ups", sa.Column("created_by_key", sa.Uuid(), nullable=True))


def downgrade() -> None:
    """Take them back."""
    op.drop_column("follow_ups", "created_by_key")
    op.drop_column("follow_ups", "accepted_duration")

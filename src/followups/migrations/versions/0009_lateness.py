"""From when on lateness counts where sending hours have held a follow-up."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column: it has no default, so no row is rewritten."""
    op.add_column("follow_ups", sa.Column("sendable_from", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Take it back."""
    op.drop_column("follow_ups", "sendable_from")

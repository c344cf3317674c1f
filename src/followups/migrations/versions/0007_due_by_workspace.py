"""Add the index by which a fair claim shares a backlog between workspaces.

The index is built without stopping the system, as in migration 0006.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

INDEX = "ix_follow_ups_due_by_workspace"


def upgrade() -> None:
    """Create the index, outside a transaction."""
    with op.get_context().autocommit_block():
        op.drop_index(INDEX, table_name="follow_ups", if_exists=True, postgresql_concurrently=True)
        op.create_index(
            INDEX,
            "follow_ups",
            ["workspace_id", sa.text("COALESCE(next_attempt_at, due_date)"), "id"],
            postgresql_where=sa.text("status = 'pending' AND waits_for IS NULL"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    """Drop the index."""
    op.drop_index(INDEX, table_name="follow_ups")

"""Add an index of external ids, which finds chats with the same id in other workspaces.

This check applies only if each external id may belong to only one workspace.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

NAME = "ix_chats_external_id"


def upgrade() -> None:
    """Create the index concurrently, outside a transaction.

    If an interrupted run has left the index, it is dropped first.
    """
    with op.get_context().autocommit_block():
        op.drop_index(NAME, table_name="chats", if_exists=True, postgresql_concurrently=True)
        op.create_index(
            NAME,
            "chats",
            ["external_id"],
            postgresql_where=sa.text("external_id IS NOT NULL"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    """Drop the index."""
    op.drop_index(NAME, table_name="chats")

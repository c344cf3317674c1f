"""Add an index of external ids, to find chats of other workspaces that have the same external id.

The index is used only if two workspaces must not share an external id.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

NAME = "ix_chats_external_id"


def upgrade() -> None:
    """Create the index concurrently, outside a transaction.

    An index left behind by an interrupted run is dropped first.
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

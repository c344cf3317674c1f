"""Index of the chats' external ids: whether another workspace has one is asked where it belongs to one workspace."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0008"

NAME = "ix_chats_external_id"


def upgrade() -> None:
    """Create it concurrently, outside a transaction; one that was broken off is dropped first."""
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # it waits for open transactions, and nothing waits for it
        op.drop_index(NAME, table_name="chats", if_exists=True, postgresql_concurrently=True)
        op.create_index(
            NAME,
            "chats",
            ["external_id"],
            postgresql_where=sa.text("external_id IS NOT NULL"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    """Take it back."""
    op.drop_index(NAME, table_name="chats")

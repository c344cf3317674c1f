"""Add indexes for finished, retried and held follow-ups, built without stopping the system.

Each index is built concurrently, so other sessions do not wait, even if the table is large. An interrupted build leaves
an invalid index. PostgreSQL keeps an invalid index up to date, but no query uses it. The migration first drops any
index that has the same name.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

INDEXES: tuple[tuple[str, str, list[str], str | None, bool], ...] = (
    ("ix_follow_ups_finished", "follow_ups", ["finished_at"], "finished_at IS NOT NULL", False),
    ("ix_follow_ups_retry_of", "follow_ups", ["retry_of"], "retry_of IS NOT NULL", True),
    ("ix_follow_ups_paused", "follow_ups", ["pause_id"], "pause_id IS NOT NULL AND status = 'pending'", False),
    (
        "ix_follow_ups_quiet",
        "follow_ups",
        ["workspace_id", "held_until"],
        "held_until IS NOT NULL AND status = 'pending'",
        False,
    ),
    ("ix_chat_messages_created_at", "chat_messages", ["created_at"], None, False),
)


def upgrade() -> None:
    """Create the indexes, each outside a transaction."""
    with op.get_context().autocommit_block():
        for name, table, columns, where, unique in INDEXES:
            op.drop_index(name, table_name=table, if_exists=True, postgresql_concurrently=True)
            op.create_index(
                name,
                table,
                columns,
                unique=unique,
                postgresql_where=sa.text(where) if where else None,
                postgresql_concurrently=True,
            )


def downgrade() -> None:
    """Drop the indexes."""
    for name, table, *_ in INDEXES:
        op.drop_index(name, table_name=table)
